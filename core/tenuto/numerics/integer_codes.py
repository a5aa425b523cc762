"""Affine quantization as pure functions: codes, ranges, packing.

q = clip(round(x / scale) + zero_point, low, high),  x^ = scale * (q - zero_point).
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-8  # the smallest scale: a channel of zeros must not divide by zero


def code_limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code: [-2^(b-1)+1, 2^(b-1)-1] if symmetric, else [0, 2^b - 1]."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        return -top, top
    return 0, 2**bits - 1


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Codes of `x` as float integers; `scale` and `zero_point` broadcast against `x`."""
    return (x / scale).round_().add_(zero_point).clamp_(low, high)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of `codes`: scale * (codes - zero_point), in the dtype of `scale`."""
    return (codes.to(scale.dtype) - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Quantize and dequantize at once: what simulated execution computes."""
    return dequantize(quantize(x, scale, zero_point, low, high), scale, zero_point)


def affine(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover [low, high]; zero always lies inside the range."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    bottom, top = code_limits(bits, symmetric)
    if symmetric:
        scale = torch.maximum(-low, high).div(top).clamp_min(TINY)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (top - bottom)).clamp_min(TINY)
    return scale, (-low / scale).round().clamp(bottom, top)


def row_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row of `x` (R, ...): two tensors (R,)."""
    return torch.aminmax(x.flatten(1), dim=1)


def minmax(w: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Min-max scale and zero point of each row of `w` (R, ...): two tensors (R,)."""
    return affine(*row_range(w), bits, symmetric)


def percentile(
    w: Tensor, bits: int, symmetric: bool, share: float = 0.999
) -> tuple[Tensor, Tensor]:
    """Like `minmax`, but the range covers the central `share` of each row's values."""
    rows = w.flatten(1).float()
    tail = torch.tensor([(1 - share) / 2, (1 + share) / 2], device=w.device)
    low, high = torch.quantile(rows, tail, dim=1)
    return affine(low, high, bits, symmetric)


def mse(
    w: Tensor, bits: int, symmetric: bool, candidates: int = 80, power: float = 2.4
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of `w` (R, ...) with the least mean |error|^power.

    The candidates shrink the min-max range by 0 .. (candidates - 1) per cent; 80 and 2.4 are the
    values of the released TFMQ-DM code (arXiv 2311.16503). Every fourth is tried first, then the
    neighbours of the best one of each row.
    """
    rows = w.flatten(1)
    few = max(1, AT_ONCE["cpu" if rows.device.type == "cpu" else "other"] // max(1, rows.shape[1]))
    found = [_mse(part, bits, symmetric, candidates, power) for part in rows.split(few)]
    scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale, zero


AT_ONCE = {"cpu": 2**18, "other": 2**26}  # values that are searched together, in a CPU's cache
COARSE = 4  # per cent between the first candidates of `mse`


def _mse(
    rows: Tensor, bits: int, symmetric: bool, candidates: int, power: float
) -> tuple[Tensor, Tensor]:
    """`mse` of rows (R, K)."""
    low, high = row_range(rows)
    best = torch.zeros_like(low)  # shrinkage in per cent, a row
    least = torch.full_like(low, torch.inf)
    coarse = [torch.full_like(low, shrink) for shrink in range(0, candidates, COARSE)]
    for shrink in coarse:
        least, best = _better(rows, low, high, shrink, bits, symmetric, power, least, best)
    centre = best
    for step in [s for s in range(1 - COARSE, COARSE) if s]:
        shrink = (centre + step).clamp(0, candidates - 1)
        least, best = _better(rows, low, high, shrink, bits, symmetric, power, least, best)
    return affine(low * (1 - best / 100), high * (1 - best / 100), bits, symmetric)


def _better(
    rows: Tensor,
    low: Tensor,
    high: Tensor,
    shrink: Tensor,
    bits: int,
    symmetric: bool,
    power: float,
    least: Tensor,
    best: Tensor,
) -> tuple[Tensor, Tensor]:
    """(error, shrinkage) of each row (R,) after trying `shrink` per cent."""
    keep = 1 - shrink / 100
    scale, zero = affine(low * keep, high * keep, bits, symmetric)
    bottom, top = code_limits(bits, symmetric)
    error = fake_quantize(rows, scale[:, None], zero[:, None], bottom, top).sub_(rows).abs_()
    error = error.pow_(power).mean(1)
    return torch.minimum(error, least), torch.where(error < least, shrink, best)


RANGES = {"minmax": minmax, "mse": mse, "percentile": percentile}


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, low half first: uint8 (..., K) -> uint8 (..., ceil(K / 2))."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_int4(packed: Tensor, size: int) -> Tensor:
    """The inverse of `pack_int4`: uint8 (..., ceil(size / 2)) -> uint8 (..., size)."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.flatten(-2)[..., :size]
