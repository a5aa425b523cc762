"""Codes of 4 or 6 bits that stand for 8-bit whole numbers, by a factor for each group of columns.

value = scale[n] * number,   number = clamp(round(entry[code] * step[n, g]), -127, 127).
step is an e4m3 float. With 4 bits, entry is a fixed table of 16 numbers, about those that suit
weights of a normal distribution; with 6 bits it is the code itself, from -31 to 31. The product of
whole numbers is one of 8-bit codes, whatever the groups (ComfyUI's `asym_w4a8_int8`). A *level* is
the place of an entry, signed: -8 to 7, or -31 to 31; of equal numbers several levels may do.

Shapes: `x` in units of its row's scale, `step` fp32 of its shape, or with one last column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import float8
from .integer_codes import TINY, pack_int4, unpack_int4

TABLE = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)  # fmt: skip
TABLE_FP32 = tuple(torch.tensor(TABLE, dtype=torch.float32).tolist())  # as files have it
BITS = (4, 6)
GROUPS = (16, 32, 64)  # columns that may share a step
HIGHEST = 127.0  # the largest number that a scale multiplies
TOPS = {4: (TABLE[-1], 128.0), 6: (31.0, 4.0)}  # the last entry; the step of a row's widest group


def fits(columns: int, bits: int, group: int) -> bool:
    """Whether a row of so many columns can be kept so."""
    return columns % (16 if bits == 4 else 32) == 0 and columns % group == 0


def start(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales (N,) and steps (N, G) with which every value of (N, G, g) lies among the numbers."""
    last, widest = TOPS[bits]
    wanted = groups.abs().amax(-1) / last
    scale = (wanted.amax(1) / widest).clamp_min(TINY)
    return scale, wanted / scale[:, None]


def number(level: Tensor, step: Tensor, bits: int) -> Tensor:
    """What the scale multiplies, whole fp32 numbers."""
    entry = level.float()
    if bits == 4:
        place = level.flatten().to(torch.int32) + 8
        entry = _table(level).index_select(0, place).view(level.shape)
    return (entry * step).round_().clamp_(-HIGHEST, HIGHEST)


def value(level: Tensor, step: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Values, fp32, as readers compute them."""
    return number(level, step, bits) * scale


def nearest(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """Levels of the numbers nearest to `x`, fp32; of two that are as near, the lower."""
    if bits == 4:
        return _found(_tables(x.device)[0], _halves(x), _row(step))
    near = (x / step).round_().clamp_(-31, 31)
    best = (near - 1).clamp_min_(-31)
    least = (number(best, step, bits) - x).abs_()
    for level in (near, (near + 1).clamp_max_(31)):  # rounding moves a number by half at most
        error = (number(level, step, bits) - x).abs_()
        best = torch.where(error < least, level, best)
        least = torch.minimum(error, least)
    return best


def numbers_near(x: Tensor, bits: int) -> Callable[[Tensor], Tensor]:
    """A function of `step` that gives the numbers nearest to `x`, for several steps in turn."""
    if bits != 4:
        return lambda step: number(nearest(x, step, bits), step, bits)
    halves, table = _halves(x), _tables(x.device)[1]
    return lambda step: _found(table, halves, _row(step))


def values_near(step: Tensor, scale: Tensor, bits: int) -> Callable[[int, Tensor], Tensor]:
    """A function of j and x (N,) that gives the values nearest to x with the steps `step[j]`.

    step: (W, N). scale: (N,).
    """
    if bits != 4:
        return lambda j, x: value(nearest(x / scale, step[j], bits), step[j], scale, bits)
    rows, table = _row(step), _tables(step.device)[1]
    middle, factor = torch.full_like(scale, WIDE / 2), -2 / scale
    return lambda j, x: _found(
        table, torch.addcmul(middle, x, factor).clamp_(1, WIDE - 1).to(torch.int32), rows[j]
    ).mul_(scale)


# With 4 bits the numbers are whole, so what lies halfway between two is a multiple of 1/2: which of
# them is nearest, ceil(2 x) tells, and there are only 126 steps. It is looked up, by what is cut
# off of 256 - 2 x, which costs less than rounding up does.
WIDE = 512  # of a row of the tables: ceil(2 x) is from -255 to 255


def _halves(x: Tensor) -> Tensor:
    return (x * -2).add_(WIDE / 2).clamp_(1, WIDE - 1).to(torch.int32)


def _row(step: Tensor) -> Tensor:
    """Where the row of an e4m3 step begins."""
    return float8.places(step).mul_(WIDE)


def _found(table: Tensor, halves: Tensor, row: Tensor) -> Tensor:
    place = halves + row
    return table.index_select(0, place.flatten()).view(place.shape)


def _tables(device: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _made_tables(str(device))


@functools.cache
def _made_tables(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """By step and 256 - ceil(2 x): the level, and the number; fp32 (127 * WIDE,).

    The third: by step and byte the numbers of both its codes, two fp32 in an int64 (127 * 256,).
    """
    with torch.inference_mode(False):  # or they could not be used where there are gradients
        step = torch.tensor(float8.VALUES[: float8.HIGHEST + 1])
        numbers = (torch.tensor(TABLE) * step[:, None]).round_().clamp_(-HIGHEST, HIGHEST)
        doubled = numbers[:, 1:] + numbers[:, :-1]  # twice the middles
        halves = torch.arange(WIDE // 2, -WIDE // 2, -1).float()
        place = torch.searchsorted(doubled, (halves - 0.5).expand(len(step), -1).contiguous())
        level, number = place.float() - 8, numbers.gather(1, place)
        low = numbers[:, None, :].expand(-1, 16, -1)  # of a byte's low half, an even column's
        pairs = torch.stack((low, numbers[:, :, None].expand(-1, -1, 16)), -1)
        pairs = pairs.flatten().view(torch.int64)
        return level.flatten().to(device), number.flatten().to(device), pairs.to(device)


def decoded(qdata: Tensor, step: Tensor, scale: Tensor, columns: int, bits: int) -> Tensor:
    """Values (N, columns) of `stored` rows. step: e4m3 bytes (N, G); scale: (N, 1)."""
    group = columns // step.shape[1]
    if bits != 4:
        wide = float8.numbers(step).repeat_interleave(group, 1)
        return value(levels(qdata, columns, bits), wide, scale, bits)
    place = qdata.to(torch.int32).unflatten(1, (-1, group // 2))
    place = place.add_(step.to(torch.int32).mul_(256)[..., None]).flatten()
    pairs = _tables(qdata.device)[2].index_select(0, place)
    return pairs.view(torch.float32).view(-1, columns).mul_(scale)


def width(columns: int, bits: int) -> int:
    """Bytes of a row."""
    return columns * bits // 8


def stored(level: Tensor, bits: int) -> Tensor:
    """Levels (N, K) as bytes, uint8 (N, width): low halves, then the two high bits of four codes.

    A column of an even number has the low half of its byte.
    """
    if bits == 4:
        return pack_int4((level + 8).to(torch.uint8))
    codes = (level + 32).to(torch.uint8)
    high = codes >> 4
    quads = high[:, 0::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
    return torch.cat((pack_int4(codes & 15), quads), 1)


def levels(qdata: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of `stored`: int8 (N, columns)."""
    codes = unpack_int4(qdata[:, : columns // 2], columns)
    if bits == 4:
        return codes.to(torch.int8) - 8
    quads = qdata[:, columns // 2 :]
    high = torch.stack([quads >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)
    return (codes | high << 4).to(torch.int8) - 32


def _table(like: Tensor) -> Tensor:
    return torch.tensor(TABLE, dtype=torch.float32, device=like.device)
