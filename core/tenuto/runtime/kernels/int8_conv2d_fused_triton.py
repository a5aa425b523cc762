"""A convolution of int8 codes on CUDA as one product: no patches are made, tiles gather them.

A row of the product is a place of the output, its columns are taps and channels, channels
innermost. Sums are of 32 bits, scales and bias fp32, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int8_conv2d import out_size
from .tiles_triton import Tiles, bucket, chosen, start

HOPPER = (
    Tiles(128, 128, 64, 4, 4), Tiles(128, 256, 64, 8, 4), Tiles(128, 128, 128, 8, 3),
    Tiles(128, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 4), Tiles(64, 64, 64, 4, 5),
)  # fmt: skip


@triton.jit
def _conv2d(
    x_ptr, weight_ptr, out_ptr, image_ptr, column_ptr, sums_ptr, zero_ptr, bias_ptr,
    m, n, channels, height, width, high, wide, stride_h, stride_w, pad_h, pad_w, step_h, step_w,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, PER_IMAGE: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(m, M), tl.cdiv(n, N)
    tile = tl.program_id(0)
    first = tile // (GROUP * across) * GROUP
    group = min(down - first, GROUP)
    rows = (first + tile % (GROUP * across) % group) * M + tl.arange(0, M)
    columns = tile % (GROUP * across) // group * N + tl.arange(0, N)
    there, inside = rows < m, columns < n
    image, top = rows // (high * wide), rows // wide % high * stride_h - pad_h
    left = rows % wide * stride_w - pad_w
    depth, chunks = tl.arange(0, K), tl.cdiv(channels, K)
    weight_at = weight_ptr + (columns % n).to(tl.int64)[:, None] * (TAPS * channels)
    total = tl.zeros((M, N), tl.int32)
    if ZERO:
        none = tl.load(zero_ptr) - 128  # the code that stands for zero
    for step in range(TAPS * chunks):
        tap, channel = step // chunks, step % chunks * K + depth
        y, x = top + tap // ACROSS * step_h, left + tap % ACROSS * step_w
        fits = there & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        at = (image.to(tl.int64) * height + y) * width + x
        some = (channel < channels)[None, :]
        a = tl.load(x_ptr + at[:, None] * channels + channel[None, :], mask=fits[:, None] & some,
                    other=0)  # fmt: skip
        if ZERO:
            a = tl.where(fits[:, None], a, none.to(tl.int8))  # pyright: ignore
        b = tl.load(weight_at + tap * channels + channel[None, :], mask=some, other=0)
        total = tl.dot(a, b.T, total, out_dtype=tl.int32)
    if ZERO:
        none = tl.load(zero_ptr) - 128
        total -= none * tl.load(sums_ptr + columns, mask=inside, other=0)[None, :]
    y = total.to(tl.float32) * tl.load(column_ptr + columns, mask=inside, other=0.0)[None, :]
    if PER_IMAGE:
        y *= tl.load(image_ptr + image, mask=there, other=0.0)[:, None]
    else:
        y *= tl.load(image_ptr)
    if BIAS:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=there[:, None] & inside[None, :])


def conv2d(
    x: Tensor,
    x_scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    geometry: tuple[Any, ...],
    tiles: Tiles | None = None,
) -> Tensor:
    """The operation in `dtype`, (B, H', W', O), from int8 codes less 128: x (B, H, W, C).

    weight: int8 (O, kh, kw, C). x_scale: fp32, one element or B. zero: int32 (1,), None for 128.
    w_scale fp32 and sums int32 (O,): the latter of a whole filter. geometry: stride, padding,
    dilation.
    """
    (batch, *size, _), (n, *taps, channels) = x.shape, weight.shape
    high, wide = out_size(size, taps, geometry)
    out = torch.empty((batch, high, wide, n), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    given = (x.contiguous(), weight, out, x_scale.contiguous(), w_scale, sums, zero, bias)
    m, (stride, padding, dilation) = batch * high * wide, geometry
    numbers = (m, n, channels, *size, high, wide, *stride, *padding, *dilation)

    def run(t: Tiles) -> Tensor:
        start(
            _conv2d, (triton.cdiv(m, t.m) * triton.cdiv(n, t.n),), x, *given, *numbers,
            TAPS=taps[0] * taps[1], ACROSS=taps[1], M=t.m, N=t.n, K=t.k, GROUP=t.group,
            PER_IMAGE=x_scale.numel() > 1, ZERO=zero is not None, BIAS=bias is not None,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        return out

    kind = (bucket(m), n, channels, *taps, *stride, str(dtype))
    return run(tiles or chosen(_conv2d, kind, HOPPER, x.device, run))
