"""The 4-bit float e2m1, by an e4m3 factor for each group of 16 columns (NVFP4).

value = entry[code] * (scale * step[n, g]): 0, 1/2, 1, 3/2, 2, 3, 4 or 6, with a sign, and one scale
for the whole weight. A *level* is the place of an entry, signed: -7 to 7, and 0 is 0.

Shapes: `x` in units of the scale, `step` fp32 of its shape, or with one last column.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import float8
from .integer_codes import TINY

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
LEVELS = tuple(float(sum(4 * m < q for m in MIDDLES)) for q in range(22))  # by ceil(4 |x| / step)
ENTRIES = tuple(VALUES[int(level)] for level in LEVELS)
BITS = (4,)
GROUPS = (16,)
HIGHEST = VALUES[-1] * float8.MOST


def fits(columns: int, bits: int, group: int) -> bool:
    """Whether a row of so many columns can be kept so."""
    return columns % group == 0


def start(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The scale, (N,) times, and steps (N, G) with which all of (N, G, g) lies among the values."""
    most = groups.abs().amax(-1)
    scale = (most.amax() / HIGHEST).clamp_min(TINY)
    return scale.repeat(len(groups)), most / VALUES[-1] / scale


def number(level: Tensor, step: Tensor, bits: int) -> Tensor:
    """What the scale multiplies, fp32."""
    return _entry(level) * step


def value(level: Tensor, step: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Values, fp32, as readers compute them: the two scales first."""
    return _entry(level) * (scale * step)


def nearest(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """Levels of the numbers nearest to `x`, fp32; of two that are as near, that nearer to 0."""
    return _by_quarters(LEVELS, x, step)


def numbers_near(x: Tensor, bits: int) -> Callable[[Tensor], Tensor]:
    """A function of `step` that gives the numbers nearest to `x`, for several steps in turn."""
    return lambda step: _by_quarters(ENTRIES, x, step).mul_(step)


def values_near(step: Tensor, scale: Tensor, bits: int) -> Callable[[int, Tensor], Tensor]:
    """A function of j and x (N,) that gives the values nearest to x with the steps `step[j]`.

    step: (W, N). scale: (N,).
    """
    both = scale * step
    return lambda j, x: _by_quarters(ENTRIES, x / scale, step[j]).mul_(both[j])


def decoded(qdata: Tensor, step: Tensor, scale: Tensor, columns: int, bits: int) -> Tensor:
    """Values (N, columns) of `stored` rows. step: e4m3 bytes (N, G); scale: (N, 1)."""
    wide = float8.numbers(step).repeat_interleave(columns // step.shape[1], 1)
    return value(levels(qdata, columns, bits), wide, scale, bits)


def _by_quarters(table: tuple[float, ...], x: Tensor, step: Tensor) -> Tensor:
    """Middles are multiples of 1/4: ceil(4 |x| / step) tells in which interval |x| / step lies.

    By what is cut off of 22 - 4 |x| / step, which costs less than rounding up does.
    """
    last = len(table)
    left = (x / step).abs_().mul_(-4).add_(last).clamp_min_(1).to(torch.int32)
    turned = torch.tensor((0.0, *table[::-1]), device=x.device)
    return turned.index_select(0, left.flatten()).view(left.shape).copysign_(x)


def width(columns: int, bits: int) -> int:
    """Bytes of a row."""
    return columns // 2


def stored(level: Tensor, bits: int) -> Tensor:
    """Levels (N, K) as bytes, uint8 (N, K / 2); a column of an even number has the high half."""
    codes = level.abs().to(torch.uint8) | (level < 0).to(torch.uint8) << 3
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def levels(qdata: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of `stored`: int8 (N, columns)."""
    codes = torch.stack((qdata >> 4, qdata & 15), -1).flatten(1)
    size = (codes & 7).to(torch.int8)
    return torch.where(codes > 7, -size, size)


def _entry(level: Tensor) -> Tensor:
    table, place = torch.tensor(VALUES, device=level.device), level.flatten().abs().to(torch.int32)
    size = table.index_select(0, place).view(level.shape)
    return torch.where(level < 0, -size, size)
