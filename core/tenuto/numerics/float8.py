"""The 8-bit float e4m3: codes, levels, values, ranges.

A code has a sign, four bits of exponent (bias 7) and three of mantissa; there is no infinity, and
the largest value is 448 (OCP 8-bit floating point, revision 1.0, its "FN" kind). The *level* of a
code is its place in the order of values: whole, from -126 to 126, and 0 is 0. In one binade,
    |value| = (8 + level % 8) * 2^(level // 8 - 10),   and below level 8   level * 2^-9.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 448.0  # the largest value
HIGHEST = 126  # its level
TINY = 1e-8  # the smallest scale, as of whole codes
CODES = torch.float8_e4m3fn


def _value(level: int) -> float:
    if level > HIGHEST:
        return float("nan")
    return level * 2.0**-9 if level < 8 else (8 + level % 8) * 2.0 ** (level // 8 - 10)


VALUES = tuple(_value(level) for level in range(HIGHEST + 2))


def reference_levels(x: Tensor) -> Tensor:
    """`levels` in plain operations: the nearest, a tie to the even one, all beyond 448 to it."""
    size = x.abs().float().clamp_max(MOST)
    exponent = torch.frexp(size.clamp_min(2.0**-6)).exponent.long() - 1  # -6 to 8
    powers = torch.tensor([2.0 ** (3 - e) for e in range(-6, 9)], device=x.device)
    level = (size * powers[exponent + 6]).round_() + 8 * (exponent + 6)
    return torch.where(x < 0, -level, level)


def levels(x: Tensor) -> Tensor:
    """Levels nearest to `x`, fp32 of its shape."""
    if not _has(x):
        return reference_levels(x)
    return level_of(bits_of(cast(x))).float()


def places(x: Tensor) -> Tensor:
    """Levels of positive e4m3 numbers in fp32, int32."""
    if not _has(x):
        return reference_levels(x).to(torch.int32)
    return bits_of(x.to(CODES)).to(torch.int32)


def cast(x: Tensor) -> Tensor:
    """The values nearest to `x` in torch's 8-bit type; in fp32 on a device that has none."""
    if not _has(x):
        return values(reference_levels(x))
    return x.float().clamp(-MOST, MOST).to(CODES)


def values(level: Tensor) -> Tensor:
    """What levels stand for, fp32."""
    return bytes_of(level).view(CODES).float() if _has(level) else reference_values(level)


def reference_values(level: Tensor) -> Tensor:
    """`values` by the table."""
    table = torch.tensor(VALUES, device=level.device)
    size = table[level.abs().long()]
    return torch.where(level < 0, -size, size)


def bits_of(codes: Tensor) -> Tensor:
    """Codes in torch's 8-bit type as the bytes they are, uint8."""
    return codes.view(torch.uint8)


def codes_of(bits: Tensor) -> Tensor:
    """Bytes, uint8, in torch's 8-bit type; as fp32 on a device that has none."""
    return bits.view(CODES) if _has(bits) else values(level_of(bits))


def numbers(bits: Tensor) -> Tensor:
    """What bytes (uint8) stand for, fp32."""
    return codes_of(bits).float()


def level_of(bits: Tensor) -> Tensor:
    """Bytes (uint8) as levels, int8."""
    size = (bits & 127).to(torch.int8)
    return torch.where(bits > 127, -size, size)


def bytes_of(level: Tensor) -> Tensor:
    """Levels, floating or not, as bytes: the inverse of `level_of`."""
    whole = level.to(torch.int16)
    return torch.where(whole < 0, 128 - whole, whole).to(torch.uint8)


def covering(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (of zero) that cover [low, high] as 448 covers it."""
    scale = torch.maximum(-low, high).clamp_min(0).div(MOST).clamp_min(TINY)
    return scale, torch.zeros_like(scale)


def per_tensor(x: Tensor, scale: Tensor) -> Tensor:
    """Codes of a stored range: `cast` of x / scale."""
    return cast(x.float() / scale)


def per_row(x: Tensor, dims: tuple[int, ...] = (-1,)) -> tuple[Tensor, Tensor]:
    """Codes and fp32 scales of a range found over `dims` of `x`, never over the batch."""
    x = x.float()
    scale = x.abs().amax(dims, keepdim=True).div_(MOST).clamp_min_(TINY)
    return cast(x / scale), scale


def _has(x: Tensor) -> bool:
    """Whether torch casts to its 8-bit type where `x` is."""
    return x.device.type in ("cpu", "cuda")
