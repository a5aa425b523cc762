"""`rotary.py` on CUDA: a program turns heads that share their angles, which it reads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles_triton import Tiles, bucket, chosen, start

SINGLE = tl.constexpr(1)


@triton.jit
def _pairs(
    ptr, rows, stride, half, there, ROWS: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr
):
    """The first and the second of each pair of columns, fp32 (ROWS, HALF). rows: where they begin.

    Neighbours are read together and parted in registers: alone, every second one would be read.
    """
    if HALVES:
        column = tl.arange(0, HALF)
        inside = there & (column < half)[None, :]
        place = ptr + rows + column[None, :] * stride
        a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(place + half * stride, mask=inside, other=0.0).to(tl.float32)
        return a, b
    column = tl.arange(0, 2 * HALF)
    inside = there & (column < 2 * half)[None, :]
    x = tl.load(ptr + rows + column[None, :] * stride, mask=inside, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(x, (ROWS, HALF, 2)))  # pyright: ignore


@triton.jit
def _angles(
    ptr, rows, stride, half, there,
    ROWS: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Cosines or sines of both columns of each pair. SHARED: they are equal, and stored once."""
    if SHARED:
        column = tl.arange(0, HALF)
        inside = there & (column < half)[None, :]
        x = tl.load(ptr + rows + column[None, :] * stride, mask=inside, other=0.0).to(tl.float32)
        return x, x
    return _pairs(ptr, rows, stride, half, there, ROWS, HALF, HALVES)  # pyright: ignore


@triton.jit
def _turned(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, places, heads, half, eps,
    x_a, x_b, x_c, x_d, cos_a, cos_b, cos_c, cos_d, sin_a, sin_b, sin_c, sin_d,
    out_a, out_b, out_c,
    ROWS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, HALVES: tl.constexpr,
    SHARED: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Place b of a: its heads c, ROWS at a time. ALIKE: all have the angles of the first."""
    a, b = (tl.program_id(0) // places).to(tl.int64), (tl.program_id(0) % places).to(tl.int64)
    one = tl.zeros((1, 1), tl.int64)
    cos_at, sin_at = a * cos_a + b * cos_b + one, a * sin_a + b * sin_b + one
    true = one == 0
    c0, c1, s0, s1 = one, one, one, one
    if ALIKE:
        c0, c1 = _angles(cos_ptr, cos_at, cos_d, half, true, SINGLE, HALF, HALVES, SHARED)
        s0, s1 = _angles(sin_ptr, sin_at, sin_d, half, true, SINGLE, HALF, HALVES, SHARED)
    w0, w1 = one, one
    if NORM:
        w0, w1 = _pairs(weight_ptr, one, 1, half, true, SINGLE, HALF, HALVES)
    for begin in range(0, heads, ROWS):
        c = (begin + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        there = c < heads
        at = a * x_a + b * x_b + c * x_c
        x, y = _pairs(x_ptr, at, x_d, half, there, ROWS, HALF, HALVES)
        if NORM:
            squares = tl.sum(x * x + y * y, 1)
            inverse = tl.rsqrt(squares / (2 * half) + eps)[:, None]
            x, y = x * inverse * w0, y * inverse * w1
        if ALIKE:
            left, right = x * c0 - y * s0, y * c1 + x * s1
        else:
            at = cos_at + c * cos_c
            u0, u1 = _angles(cos_ptr, at, cos_d, half, there, ROWS, HALF, HALVES, SHARED)
            at = sin_at + c * sin_c
            v0, v1 = _angles(sin_ptr, at, sin_d, half, there, ROWS, HALF, HALVES, SHARED)
            left, right = x * u0 - y * v0, y * u1 + x * v1
        out = out_ptr + a * out_a + b * out_b + c * out_c
        kind = out_ptr.dtype.element_ty
        if HALVES:
            column = tl.arange(0, HALF)[None, :]
            inside = there & (column < half)
            tl.store(out + column, left.to(kind), mask=inside)
            tl.store(out + half + column, right.to(kind), mask=inside)
        else:
            column = tl.arange(0, 2 * HALF)[None, :]
            both = tl.reshape(tl.join(left, right), (ROWS, 2 * HALF)).to(kind)
            tl.store(out + column, both, mask=there & (column < 2 * half))


def turn(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, halves: bool,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """`rotary.reference`; x: fp16, bf16 or fp32. tiles: these, and none are tried."""
    half = x.shape[-1] // 2
    shared = cos.shape[-1] == half
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos, sin = (t.expand(*x.shape[:3], t.shape[-1]) for t in (cos, sin))
    given = [x, cos, sin, out]
    if cos.stride(1) == sin.stride(1) == 0 and cos.stride(2):  # heads come before the places
        given = [t.transpose(1, 2) for t in given]
    given, cos, sin, to = given[0], *given[1:]
    alike = cos.stride(2) == sin.stride(2) == 0
    images, places, heads = given.shape[:3]
    wide = triton.next_power_of_2(half)
    factors = x if weight is None else weight.contiguous()

    def run(t: Tiles) -> Tensor:
        start(
            _turned, (images * places,), x,
            given, factors, cos, sin, to, places, heads, half, eps,
            *given.stride(), *cos.stride(), *sin.stride(), *to.stride()[:3], ROWS=t.m, HALF=t.n,
            NORM=weight is not None, HALVES=halves, SHARED=shared, ALIKE=alike, num_warps=t.warps,
        )  # fmt: skip
        return out

    most = triton.next_power_of_2(heads)
    sizes = ((1024, 2), (1024, 4), (512, 2), (512, 1), (2048, 4))  # columns at a time, warps
    some = list(dict.fromkeys(Tiles(max(1, min(n // wide, most)), wide, 0, w) for n, w in sizes))
    kind = (
        bucket(images * places), heads, x.shape[-1], weight is None, halves, shared, alike,
        str(x.dtype), str(cos.dtype),
    )  # fmt: skip
    return run(tiles or chosen(_turned, kind, some, x.device, run))
