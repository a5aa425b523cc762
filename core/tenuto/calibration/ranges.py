"""Ranges of a weight that are searched by more than the weight's own error, as a format keeps them.

A search finds the distance of neighbouring values `size` and the code of zero `zero` of every
range, (N, G) each, as if each were kept as a number. With groups of columns a row has one scale and
its groups whole multiples of it (`numerics/grid.py`): `kept` rounds to what can be kept, looks
around there, and never ends up worse than what the search started from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..numerics import Format, Grid, QTensor, ends
from ..numerics.grid import WIDEST

Cost = Callable[[Tensor, Tensor], Tensor]  # of (size, zero), each (N, G): what it costs, (N, G)


def searchable(form: Format) -> bool:
    """Whether the ranges of a format can be any: whole codes that are not rotated."""
    return form.dtype == "int" and not form.rotate


def started(
    weight: Tensor, form: Format, before: Mapping[str, QTensor] | None, name: str
) -> QTensor:
    """What the stages before found for the layer `name`, else its `weight` (N, ...) to nearest."""
    return QTensor.nearest(weight, form) if before is None else before[name]


def scaled(weight: Tensor, q: QTensor) -> Tensor:
    """`weight` (N, ...) as fp32 rows (N, K), times the scale of each column where `q` has one."""
    rows = weight.detach().flatten(1).float()
    return rows if q.channel is None else rows * q.channel


def in_groups(rows: Tensor, form: Format) -> Tensor:
    """Rows (N, K) as their ranges (N, G, g), with zeros after the last column."""
    size = form.group or rows.shape[1]
    return F.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))


def nearest(groups: Tensor, size: Tensor, zero: Tensor, form: Format) -> Tensor:
    """Levels (N, G, g) of the values nearest to `groups`."""
    low, high = ends(form)
    size, zero = size[..., None], zero[..., None]
    return (groups / size).round_().clamp_(low - zero, high - zero)


def sizes(grid: Grid) -> Tensor:
    """The distance of neighbouring values of every range of a grid, (N, G)."""
    scale = grid.scale[:, None]
    return scale if grid.step is None else scale * grid.step


def lower(best: Any, tried: Any) -> Any:
    """The cheaper of two (cost, *what), each (N, G), range by range."""
    less = tried[0] < best[0]
    return tuple(torch.where(less, new, old) for old, new in zip(best, tried, strict=True))


def kept(size: Tensor, zero: Tensor, start: Grid, cost: Cost) -> Grid:
    """The grid nearest to what a search found, or better; a row of `start` where that is cheaper.

    size, zero: fp32 (N, G).
    """
    form, first = start.form, cost(sizes(start), start.zero).sum(1)
    found = Grid.fitting(size, zero, form)
    best: Any = (cost(sizes(found), found.zero), *_facts(found))
    if found.step is not None:
        low, high = ends(form)
        for move in (-1, 1):
            farthest = torch.maximum(zero - low, high - zero)
            step = torch.minimum((found.step + move).clamp_min(1), (WIDEST / farthest).floor())
            best = lower(best, (cost(step * found.scale[:, None], zero), zero, step))
    better = (best[0].sum(1) < first)[:, None]
    zero = torch.where(better, best[1], start.zero)
    scale = torch.where(better[:, 0], found.scale, start.scale)
    step = None if start.step is None else torch.where(better, best[2], start.step)
    return Grid(scale, zero, step, form)


def _facts(grid: Grid) -> tuple[Tensor, ...]:
    return (grid.zero,) if grid.step is None else (grid.zero, grid.step)


def rounded(weight: Tensor, q: QTensor, grid: Grid) -> QTensor:
    """`weight` (N, ...) at the nearest values of `grid`, with the scale per column of `q`."""
    rows = scaled(weight, q)
    levels = grid.nearest(rows).view(weight.shape)
    return QTensor.of(levels, grid, q.channel)
