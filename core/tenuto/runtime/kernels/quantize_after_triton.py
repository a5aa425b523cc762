"""`quantize_after.py` on CUDA: a program makes whole rows, keeps them in registers, and rounds."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import integer_codes
from .quantize_input import TYPES
from .quantize_input_triton import TILE, TOP, coded, larger, lines, ranged, scale_of, warps
from .tiles_triton import Tiles, bucket, chosen, start

PARTS = (  # of a row, for long ones: n columns at a time
    Tiles(1, 512, 0, 4), Tiles(1, 1024, 0, 4), Tiles(1, 2048, 0, 4), Tiles(1, 2048, 0, 8),
    Tiles(1, 4096, 0, 8),
)  # fmt: skip


@triton.jit
def _act(x, ACT: tl.constexpr):
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def _made(
    before_ptr, x_ptr, gate_ptr, far, there, column, first, columns,
    before_stride, x_stride, gate_stride,
    ACT: tl.constexpr, GATED: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """[before, act(x) * gate] of rows `far` at `column`, 0 beyond their end."""
    inside = there & (column < columns)[None, :]
    mine = inside & (column >= first)[None, :] if BEFORE else inside
    at = (column - first)[None, :] if BEFORE else column[None, :]
    x = _act(tl.load(x_ptr + far * x_stride + at, mask=mine, other=0.0).to(tl.float32), ACT)
    if GATED:
        x *= tl.load(gate_ptr + far * gate_stride + at, mask=mine, other=0.0).to(tl.float32)
    if BEFORE:
        its = there & (column < first)[None, :]
        place = before_ptr + far * before_stride + column[None, :]
        x = tl.where(mine, x, tl.load(place, mask=its, other=0.0).to(tl.float32))
    return x


@triton.jit
def _acted(
    before_ptr, x_ptr, gate_ptr, codes_ptr, scale_ptr, rows, first, columns,
    before_stride, x_stride, gate_stride,
    ROWS: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, TOP: tl.constexpr,
    TINY: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    there, far = (row < rows)[:, None], row.to(tl.int64)[:, None]
    codes = codes_ptr + far * columns
    if PARTS:  # a row is made twice, a part at a time: its range, then its codes
        top = tl.zeros((ROWS, WIDE), tl.float32)
        for start in range(0, columns, WIDE):
            x = _made(
                before_ptr, x_ptr, gate_ptr, far, there, start + column, first, columns,
                before_stride, x_stride, gate_stride, ACT, GATED, BEFORE,
            )  # fmt: skip
            top = larger(top, tl.abs(x))
        size = tl.reduce(top, 1, larger)
        scale, inverse = scale_of(size, ROWS, TOP, TINY)  # pyright: ignore[reportArgumentType]
        for start in range(0, columns, WIDE):
            at = start + column
            x = _made(
                before_ptr, x_ptr, gate_ptr, far, there, at, first, columns,
                before_stride, x_stride, gate_stride, ACT, GATED, BEFORE,
            )  # fmt: skip
            value = coded(x, scale, inverse, ROWS, WIDE, TOP, WHOLE)
            inside = there & (at < columns)[None, :]
            tl.store(codes + at[None, :], value.to(codes_ptr.dtype.element_ty), mask=inside)
    else:
        x = _made(
            before_ptr, x_ptr, gate_ptr, far, there, column, first, columns,
            before_stride, x_stride, gate_stride, ACT, GATED, BEFORE,
        )  # fmt: skip
        value, scale = ranged(x, ROWS, WIDE, TOP, TINY, WHOLE)
        inside = there & (column < columns)[None, :]
        tl.store(codes + column[None, :], value.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def _line(ptr, far, column, inside):
    return tl.load(ptr + far + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normed(
    x_ptr, weight_ptr, bias_ptr, times_ptr, plus_ptr, codes_ptr, scale_ptr, rows, columns, each,
    x_stride, times_stride, plus_stride, eps,
    ROWS: tl.constexpr, WIDE: tl.constexpr, TOP: tl.constexpr, TINY: tl.constexpr,
    WHOLE: tl.constexpr, CENTERED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    TIMES: tl.constexpr, PLUS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    far = row.to(tl.int64)[:, None]
    x = _line(x_ptr, far * x_stride, column, inside)
    if CENTERED:
        x = tl.where(inside, x - (tl.sum(x, 1) / columns)[:, None], 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 1) / columns + eps)[:, None]
    if WEIGHT:
        x *= _line(weight_ptr, tl.zeros_like(far), column, inside)
    if BIAS:
        x += _line(bias_ptr, tl.zeros_like(far), column, inside)
    image = far // each
    if TIMES:
        x *= _line(times_ptr, image * times_stride, column, inside)
    if PLUS:
        x += _line(plus_ptr, image * plus_stride, column, inside)
    value, scale = ranged(x, ROWS, WIDE, TOP, TINY, WHOLE)
    place = codes_ptr + far * columns + column[None, :]
    tl.store(place, value.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


def acted(
    before: Tensor | None, x: Tensor, gate: Tensor | None, act: str, dtype: str,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`quantize_after.quantize_acted`; x: fp16, bf16 or fp32. tiles: these, and none are tried."""
    flat = lines(x)
    others = [flat if other is None else lines(other) for other in (before, gate)]
    first = 0 if before is None else before.shape[-1]
    columns = first + x.shape[-1]
    codes, scale = _answer(x, columns, dtype)

    def run(t: Tiles) -> None:
        start(
            _acted, (triton.cdiv(len(flat), t.m),), x,
            others[0], flat, others[1], codes, scale, len(flat), first, columns,
            others[0].stride(0), flat.stride(0), others[1].stride(0), ACT=act,
            GATED=gate is not None, BEFORE=before is not None, PARTS=t.n < columns,
            **_options(t, dtype),
        )  # fmt: skip

    if tiles is None:
        some = (*_whole_rows(columns), *(t for t in PARTS if t.n < columns))
        kind = (bucket(len(flat)), first, columns, act, gate is None, str(x.dtype), dtype)
        tiles = chosen(_acted, kind, some, x.device, run)
    run(tiles)
    return codes, scale


def normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, times: Tensor | None,
    plus: Tensor | None, eps: float, centered: bool, dtype: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`quantize_after.quantize_normed`; x: fp16, bf16 or fp32."""
    flat, columns = lines(x), x.shape[-1]
    codes, scale = _answer(x, columns, dtype)
    factors = [flat if t is None else t.contiguous() for t in (weight, bias)]
    moved = [flat if t is None else lines(t) for t in (times, plus)]
    strides = [t.stride(0) if len(t) > 1 else 0 for t in moved]
    given = [t is not None for t in (weight, bias, times, plus)]

    def run(t: Tiles) -> None:
        start(
            _normed, (triton.cdiv(len(flat), t.m),), x,
            flat, *factors, *moved, codes, scale, len(flat), columns, len(flat) // len(x),
            flat.stride(0), *strides, eps, CENTERED=centered, WEIGHT=given[0], BIAS=given[1],
            TIMES=given[2], PLUS=given[3], **_options(t, dtype),
        )  # fmt: skip

    kind = (bucket(len(flat)), columns, centered, *given, str(x.dtype), dtype)
    run(chosen(_normed, kind, _whole_rows(columns), x.device, run))
    return codes, scale


def _whole_rows(columns: int) -> tuple[Tiles, ...]:
    """Programs that keep rows in registers, the safe one first. n: the columns of a program."""
    wide = triton.next_power_of_2(columns)
    high, usual = max(1, TILE // wide), warps(wide)
    more = (max(1, usual // 2), 2 * usual) if wide <= 4096 else (2 * usual, 4 * usual)
    found = [Tiles(high, wide, 0, usual), *(Tiles(high, wide, 0, w) for w in more)]
    return tuple(found + ([Tiles(2 * high, wide, 0, usual)] if wide <= 2048 else []))


def _options(tiles: Tiles, dtype: str) -> dict[str, Any]:
    """The launch options that both kernels have."""
    return {
        "ROWS": tiles.m, "WIDE": tiles.n, "TOP": TOP[dtype], "TINY": integer_codes.TINY,
        "WHOLE": dtype == "int", "num_warps": tiles.warps,
    }  # fmt: skip


def _answer(x: Tensor, columns: int, dtype: str) -> tuple[Tensor, Tensor]:
    """What is written."""
    codes = torch.empty((*x.shape[:-1], columns), dtype=TYPES[dtype], device=x.device)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
