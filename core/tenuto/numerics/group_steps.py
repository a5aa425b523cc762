"""The e4m3 factors of groups of columns, and the numbers nearest to a weight with them.

For the dtypes of `scheme.LEVELS`: a module each, with the functions that are used here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import float8

TRIED = (0, 1, -1, -2, -3, -4)  # factors that a search tries, as places from the one that covers
PIECE = 2**17  # weights at a time: what a cache holds


def found(rows: Tensor, form: Any, kind: Any) -> tuple[Tensor, Tensor]:
    """Scales (N,) and steps (N, G), e4m3 numbers as fp32, of a weight (N, K) in `form`.

    Ranges "minmax": the factor nearest to the one that covers a group. "mse": that one of a few
    with which the group's values are nearest in the mean of squares.
    """
    groups = rows.unflatten(1, (-1, form.group))
    scale, wanted = kind.start(groups, form.bits)
    place = float8.levels(wanted).clamp_(1, float8.HIGHEST)
    if form.ranges == "minmax":
        return scale, float8.values(place)
    step = torch.empty_like(wanted)
    for some in _pieces(rows):
        x = groups[some] / scale[some, None, None]
        step[some] = _best(x, place[some], form.bits, kind)
    return scale, step


def _best(x: Tensor, place: Tensor, bits: int, kind: Any) -> Tensor:
    """Steps (N, G) of the groups (N, G, g), among those about `place`."""
    best, least = float8.values(place), torch.full_like(place, torch.inf)
    near = kind.numbers_near(x, bits)
    for move in TRIED:
        step = float8.values((place + move).clamp_(1, float8.HIGHEST))
        error = near(step[..., None]).sub_(x).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


def nearest(rows: Tensor, scale: Tensor, step: Tensor, form: Any, kind: Any) -> Tensor:
    """Levels (N, K) of the values nearest to a weight (N, K)."""
    out = torch.empty_like(rows)
    for some in _pieces(rows):
        x = (rows[some] / scale[some, None]).unflatten(1, (-1, form.group))
        out[some] = kind.nearest(x, step[some, :, None], form.bits).flatten(1)
    return out


def _pieces(rows: Tensor) -> list[slice]:
    count = max(1, PIECE // max(1, rows.shape[1]))
    return [slice(place, place + count) for place in range(0, len(rows), count)]
