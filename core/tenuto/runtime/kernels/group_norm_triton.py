"""`group_norm.py` on CUDA: means and squares of pieces of channels, then those of groups.

A piece is some places of an image by some channels. Its squares are of what is left without its
mean, so that nothing cancels however far from 0 an image is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles_triton import Tiles, bucket, chosen, start

PIECES = Tiles(128, 64, 0, 4), Tiles(64, 64, 0, 4), Tiles(256, 32, 0, 4), Tiles(128, 128, 0, 8)
AT_ONCE = 64  # pieces of a group that are added up together


@triton.jit
def _pieces(
    x_ptr, mean_ptr, square_ptr, places, channels, chunks, PLACES: tl.constexpr, WIDE: tl.constexpr
):
    """Of each channel in a chunk of places: its mean and the sum of squares around it."""
    image, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    place = chunk * PLACES + tl.arange(0, PLACES)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = (place < places)[:, None] & (column < channels)[None, :]
    row = (image * places + place).to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * channels + column[None, :], mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(places - chunk * PLACES, PLACES)
    mean = tl.sum(x, 0) / count
    rest = tl.where(inside, x - mean[None, :], 0.0)
    at = tl.program_id(0) * channels + column
    tl.store(mean_ptr + at, mean, mask=column < channels)
    tl.store(square_ptr + at, tl.sum(rest * rest, 0), mask=column < channels)


@triton.jit
def _groups(
    mean_ptr, square_ptr, plus_ptr, weight_ptr, bias_ptr, times_ptr, offset_ptr,
    places, channels, chunks, size, plus_stride, eps,
    PLACES: tl.constexpr, SOME: tl.constexpr, WIDE: tl.constexpr,
    PLUS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """What the channels of a group are multiplied by, and what is added. size: channels of it."""
    image, channel = tl.program_id(0), tl.arange(0, WIDE)
    mine, column = channel < size, tl.program_id(1) * size + channel
    shift = tl.zeros((WIDE,), tl.float32)
    if PLUS:
        shift = tl.load(plus_ptr + image * plus_stride + column, mask=mine, other=0.0)
        shift = shift.to(tl.float32)
    sums = tl.zeros((SOME, WIDE), tl.float32)
    for first in range(0, chunks, SOME):
        chunk = first + tl.arange(0, SOME)
        inside = (chunk < chunks)[:, None] & mine[None, :]
        at = (image * chunks + chunk)[:, None] * channels + column[None, :]
        count = tl.minimum(places - chunk * PLACES, PLACES)[:, None]
        mean = tl.load(mean_ptr + at, mask=inside, other=0.0) + shift[None, :]
        sums += tl.where(inside, mean * count, 0.0)
    whole = places * size
    middle = tl.sum(tl.sum(sums, 0), 0) / whole
    squares = tl.zeros((SOME, WIDE), tl.float32)
    for first in range(0, chunks, SOME):
        chunk = first + tl.arange(0, SOME)
        inside = (chunk < chunks)[:, None] & mine[None, :]
        at = (image * chunks + chunk)[:, None] * channels + column[None, :]
        count = tl.minimum(places - chunk * PLACES, PLACES)[:, None]
        away = tl.load(mean_ptr + at, mask=inside, other=0.0) + shift[None, :] - middle
        own = tl.load(square_ptr + at, mask=inside, other=0.0)
        squares += tl.where(inside, own + away * away * count, 0.0)
    times = tl.zeros((WIDE,), tl.float32) + tl.rsqrt(tl.sum(tl.sum(squares, 0), 0) / whole + eps)
    if WEIGHT:
        times *= tl.load(weight_ptr + column, mask=mine, other=0.0).to(tl.float32)
    offset = (shift - middle) * times
    if BIAS:
        offset += tl.load(bias_ptr + column, mask=mine, other=0.0).to(tl.float32)
    tl.store(times_ptr + image * channels + column, times, mask=mine)
    tl.store(offset_ptr + image * channels + column, offset, mask=mine)


def factors(
    x: Tensor, plus: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """times, offset (B, C, 1, 1), fp32, of x (B, C, H, W), which has its channels last."""
    (images, channels), places = x.shape[:2], x.shape[2] * x.shape[3]
    if plus is not None:
        plus = plus.reshape(-1, channels)
        plus = plus if plus.stride(-1) == 1 else plus.contiguous()
    weight, bias = (v if v is None else v.contiguous() for v in (weight, bias))
    kind = (images, bucket(places), channels, groups, str(x.dtype))

    def run(piece: Tiles) -> tuple[Tensor, Tensor]:
        return _run(x, plus, groups, weight, bias, eps, piece)

    return run(chosen(_pieces, kind, PIECES, x.device, run))


def _run(
    x: Tensor, plus: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None,
    eps: float, piece: Tiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (images, channels), places = x.shape[:2], x.shape[2] * x.shape[3]
    chunks, size = triton.cdiv(places, piece.m), channels // groups
    mean, square = x.new_empty((2, images * chunks, channels), dtype=torch.float32).unbind()
    times, offset = x.new_empty((2, images, channels, 1, 1), dtype=torch.float32).unbind()
    start(
        _pieces, (images * chunks, triton.cdiv(channels, piece.n)), x,
        x, mean, square, places, channels, chunks,
        PLACES=piece.m, WIDE=piece.n, num_warps=piece.warps,
    )  # fmt: skip
    stride = 0 if plus is None or len(plus) == 1 else plus.stride(0)
    start(
        _groups, (images, groups), x,
        mean, square, x if plus is None else plus, x if weight is None else weight,
        x if bias is None else bias, times, offset,
        places, channels, chunks, size, stride, eps,
        PLACES=piece.m, SOME=min(AT_ONCE, triton.next_power_of_2(chunks)),
        WIDE=triton.next_power_of_2(size),
        PLUS=plus is not None, WEIGHT=weight is not None, BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return times, offset
