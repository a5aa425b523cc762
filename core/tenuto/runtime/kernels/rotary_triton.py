"""`rotary.py` on CUDA: a program turns some heads, which it keeps in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles_triton import Tiles, bucket, chosen, start


@triton.jit
def _values(ptr, rows, column, stride, inside):
    return tl.load(ptr + rows[:, None] + column[None, :] * stride, mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _turned(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, rows, middle, heads, half, eps,
    x_a, x_b, x_c, x_d, cos_a, cos_b, cos_c, cos_d, sin_a, sin_b, sin_c, sin_d,
    ROWS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, HALVES: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HALF)
    inside = (row < rows)[:, None] & (column < half)[None, :]
    first, second = column * 2, column * 2 + 1
    if HALVES:
        first, second = column, column + half
    c, b = row % heads, row // heads % middle
    a = row // heads // middle
    one = _values(x_ptr, a * x_a + b * x_b + c * x_c, first, x_d, inside)
    other = _values(x_ptr, a * x_a + b * x_b + c * x_c, second, x_d, inside)
    if NORM:
        squares = tl.sum(one * one, 1) + tl.sum(other * other, 1)
        inverse = tl.rsqrt(squares / (2 * half) + eps)[:, None]
        zero = tl.zeros_like(row)
        one *= inverse * _values(weight_ptr, zero, first, 1, inside)
        other *= inverse * _values(weight_ptr, zero, second, 1, inside)
    cos_at, sin_at = a * cos_a + b * cos_b + c * cos_c, a * sin_a + b * sin_b + c * sin_c
    if SHARED:
        cos = _values(cos_ptr, cos_at, column, cos_d, inside)
        sin = _values(sin_ptr, sin_at, column, sin_d, inside)
        left = one * cos - other * sin
        right = other * cos + one * sin
    else:
        cos = _values(cos_ptr, cos_at, first, cos_d, inside)
        sin = _values(sin_ptr, sin_at, first, sin_d, inside)
        left = one * cos - other * sin
        cos = _values(cos_ptr, cos_at, second, cos_d, inside)
        sin = _values(sin_ptr, sin_at, second, sin_d, inside)
        right = other * cos + one * sin
    out = out_ptr + (row * 2 * half)[:, None]
    tl.store(out + first[None, :], left.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + second[None, :], right.to(out_ptr.dtype.element_ty), mask=inside)


def turn(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, halves: bool,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """`rotary.reference`; x: fp16, bf16 or fp32. tiles: these, and none are tried."""
    shape, half = x.shape, x.shape[-1] // 2
    shared = cos.shape[-1] == half
    cos, sin = (t.expand(*shape[:3], t.shape[-1]) for t in (cos, sin))
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    rows, wide = x.numel() // shape[-1], triton.next_power_of_2(half)
    factors = x if weight is None else weight.contiguous()

    def run(t: Tiles) -> None:
        start(
            _turned, (triton.cdiv(rows, t.m),), x,
            x, factors, cos, sin, out, rows, shape[1], shape[2], half, eps,
            *x.stride(), *cos.stride(), *sin.stride(), ROWS=t.m, HALF=t.n,
            NORM=weight is not None, HALVES=halves, SHARED=shared, num_warps=t.warps,
        )  # fmt: skip

    some = [Tiles(max(1, n // wide), wide, 0, w) for n, w in ((1024, 4), (512, 4), (2048, 8))]
    kind = (bucket(rows), shape[-1], weight is None, halves, shared, str(x.dtype), str(cos.dtype))
    run(tiles or chosen(_turned, kind, some, x.device, run))
    return out
