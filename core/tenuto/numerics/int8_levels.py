"""Codes of 4 or 6 bits that stand for 8-bit whole numbers, by a factor for each group of columns.

value = scale[n] * number,   number = clamp(round(entry[code] * step[n, g]), -127, 127).
step is an e4m3 float. With 4 bits, entry is a fixed table of 16 numbers, about those that suit
weights of a normal distribution; with 6 bits it is the code itself, from -31 to 31. The product of
whole numbers is one of 8-bit codes, whatever the groups (ComfyUI's `asym_w4a8_int8`). A *level* is
the place of an entry, signed: -8 to 7, or -31 to 31; of equal numbers several levels may do.

Shapes: `x` in units of its row's scale, `step` fp32 that broadcasts against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    entry = _table(level)[level.long() + 8] if bits == 4 else level.float()
    return (entry * step).round_().clamp_(-HIGHEST, HIGHEST)


def value(level: Tensor, step: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Values, fp32, as readers compute them."""
    return number(level, step, bits) * scale


def nearest(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """Levels of the numbers nearest to `x`, fp32; of two that are as near, the lower."""
    if bits == 4:
        numbers = (_table(x) * step[..., None]).round_().clamp_(-HIGHEST, HIGHEST)
        middles = (numbers[..., 1:] + numbers[..., :-1]) * 0.5
        return (x[..., None] > middles).sum(-1).float() - 8
    near = (x / step).round_().clamp_(-31, 31)
    best = (near - 1).clamp_min_(-31)
    least = (number(best, step, bits) - x).abs_()
    for level in (near, (near + 1).clamp_max_(31)):  # rounding moves a number by half at most
        error = (number(level, step, bits) - x).abs_()
        best = torch.where(error < least, level, best)
        least = torch.minimum(error, least)
    return best


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
