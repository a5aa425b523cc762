"""`quantize_after.py` on CUDA: a program makes whole rows, keeps them in registers, and rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize_input import TYPES
from .quantize_input_triton import (
    larger,
    largest,
    line,
    lines,
    options,
    put,
    put_rows,
    scale_of,
    total,
    whole_rows,
)
from .tiles_triton import Tiles, bucket, chosen, start

PARTS = (  # of a row, for long ones: n columns at a time
    Tiles(1, 512, 0, 4), Tiles(1, 1024, 0, 4), Tiles(1, 2048, 0, 4), Tiles(1, 2048, 0, 8),
    Tiles(1, 4096, 0, 8),
)  # fmt: skip


@triton.jit
def _sigmoid(x, QUICK: tl.constexpr):
    """QUICK: by two instructions of NVIDIA's, each right to 2 of 2^23; four times as fast."""
    if QUICK:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], tl.float32, True, 1
        )
        below = 1.0 + power  # pyright: ignore[reportOperatorIssue]
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], tl.float32, True, 1
        )
    return tl.sigmoid(x)


@triton.jit
def activated(x: tl.tensor, ACT: tl.constexpr, QUICK: tl.constexpr) -> tl.tensor:
    """ACT of x, fp32: "silu", "gelu" or "gelu tanh"; else x. QUICK: see `_sigmoid`."""
    if ACT == "silu":
        x = x * _sigmoid(x, QUICK)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        x = x * _sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x), QUICK)
    return x


@triton.jit
def _made(
    before_ptr, x_ptr, gate_ptr, far, there, column, first, columns,
    before_stride, x_stride, gate_stride,
    ACT: tl.constexpr, GATED: tl.constexpr, BEFORE: tl.constexpr, QUICK: tl.constexpr,
):  # fmt: skip
    """[before, act(x) * gate] of rows `far` at `column`, 0 beyond their end."""
    inside = there & (column < columns)[None, :]
    mine = inside & (column >= first)[None, :] if BEFORE else inside
    at = (column - first)[None, :] if BEFORE else column[None, :]
    x = tl.load(x_ptr + far * x_stride + at, mask=mine, other=0.0).to(tl.float32)
    x = activated(x, ACT, QUICK)
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
    ROWS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, PARTS: tl.constexpr,
    TOP: tl.constexpr, TINY: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, BEFORE: tl.constexpr, QUICK: tl.constexpr,
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
                before_stride, x_stride, gate_stride, ACT, GATED, BEFORE, QUICK,
            )  # fmt: skip
            top = larger(top, tl.abs(x))
        size = largest(top, ROWS)
        scale, inverse = scale_of(size, ROWS, TOP, TINY)  # pyright: ignore[reportArgumentType]
        for start in range(0, columns, WIDE):
            at = start + column
            x = _made(
                before_ptr, x_ptr, gate_ptr, far, there, at, first, columns,
                before_stride, x_stride, gate_stride, ACT, GATED, BEFORE, QUICK,
            )  # fmt: skip
            inside = there & (at < columns)[None, :]
            put(x, scale, inverse, codes, codes_ptr, at, inside, WHOLE)
        tl.store(scale_ptr + row[:, None], scale, mask=there)
    else:
        x = _made(
            before_ptr, x_ptr, gate_ptr, far, there, column, first, columns,
            before_stride, x_stride, gate_stride, ACT, GATED, BEFORE, QUICK,
        )  # fmt: skip
        more = x
        if REST:
            more = _made(
                before_ptr, x_ptr, gate_ptr, far, there, WIDE + tl.arange(0, REST), first, columns,
                before_stride, x_stride, gate_stride, ACT, GATED, BEFORE, QUICK,
            )  # fmt: skip
        put_rows(
            x, more, codes, codes_ptr, scale_ptr, row, rows, columns,
            ROWS, WIDE, REST, TOP, TINY, WHOLE,
        )  # fmt: skip


@triton.jit
def _scaled(
    x, inverse, weight_ptr, bias_ptr, times_ptr, plus_ptr, column, inside, zero, times, plus,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, TIMES: tl.constexpr, PLUS: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """What a norm and its modulation make of centered rows. times, plus: where an image's begin."""
    x *= inverse
    if WEIGHT:
        x *= line(weight_ptr, zero, column, inside)
    if BIAS:
        x += line(bias_ptr, zero, column, inside)
    if TIMES:
        factor = line(times_ptr, times, column, inside)
        x *= factor + 1.0 if ONE else factor
    if PLUS:
        x += line(plus_ptr, plus, column, inside)
    return x


@triton.jit
def _normed(
    x_ptr, weight_ptr, bias_ptr, times_ptr, plus_ptr, codes_ptr, scale_ptr, rows, columns, each,
    x_stride, times_stride, plus_stride, eps,
    ROWS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, TOP: tl.constexpr,
    TINY: tl.constexpr, WHOLE: tl.constexpr, CENTERED: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, TIMES: tl.constexpr, PLUS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, rest = tl.arange(0, WIDE), WIDE + tl.arange(0, REST if REST else 1)
    there, far = (row < rows)[:, None], row.to(tl.int64)[:, None]
    inside, beside = there & (column < columns)[None, :], there & (rest < columns)[None, :]
    x = line(x_ptr, far * x_stride, column, inside)
    more = x
    if REST:
        more = line(x_ptr, far * x_stride, rest, beside)
    if CENTERED:
        mean = total(x, ROWS)
        if REST:
            mean += total(more, ROWS)
        mean /= columns
        x = tl.where(inside, x - mean, 0.0)
        if REST:
            more = tl.where(beside, more - mean, 0.0)
    squares = total(x * x, ROWS)
    if REST:
        squares += total(more * more, ROWS)
    inverse = tl.rsqrt(squares / columns + eps)
    image, zero = far // each, tl.zeros_like(far)
    times, plus = image * times_stride, image * plus_stride
    x = _scaled(
        x, inverse, weight_ptr, bias_ptr, times_ptr, plus_ptr, column, inside, zero, times, plus,
        WEIGHT, BIAS, TIMES, PLUS, ONE,
    )  # fmt: skip
    if REST:
        more = _scaled(
            more, inverse, weight_ptr, bias_ptr, times_ptr, plus_ptr, rest, beside, zero, times,
            plus, WEIGHT, BIAS, TIMES, PLUS, ONE,
        )  # fmt: skip
    put_rows(
        x, more, codes_ptr + far * columns, codes_ptr, scale_ptr, row, rows, columns,
        ROWS, WIDE, REST, TOP, TINY, WHOLE,
    )  # fmt: skip


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

    def run(t: Tiles) -> tuple[Tensor, Tensor]:
        start(
            _acted, (triton.cdiv(len(flat), t.m),), x,
            others[0], flat, others[1], codes, scale, len(flat), first, columns,
            others[0].stride(0), flat.stride(0), others[1].stride(0), ACT=act,
            GATED=gate is not None, BEFORE=before is not None, PARTS=t.n + t.k < columns,
            QUICK=x.is_cuda and torch.version.hip is None,
            **options(t, dtype),
        )  # fmt: skip
        return codes, scale

    if tiles is None:
        some = (*whole_rows(columns), *(t for t in PARTS if t.n < columns))
        kind = (bucket(len(flat)), first, columns, act, gate is None, str(x.dtype), dtype)
        tiles = chosen(_acted, kind, some, x.device, run)
    return run(tiles)


def normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, times: Tensor | None,
    plus: Tensor | None, eps: float, centered: bool, dtype: str, one: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`quantize_after.quantize_normed`; x: fp16, bf16 or fp32. tiles: these, and none are tried."""
    flat, columns = lines(x), x.shape[-1]
    codes, scale = _answer(x, columns, dtype)
    factors = [flat if t is None else t.contiguous() for t in (weight, bias)]
    moved = [flat if t is None else lines(t) for t in (times, plus)]
    strides = [t.stride(0) if len(t) > 1 else 0 for t in moved]
    given = [t is not None for t in (weight, bias, times, plus)]

    def run(t: Tiles) -> tuple[Tensor, Tensor]:
        start(
            _normed, (triton.cdiv(len(flat), t.m),), x,
            flat, *factors, *moved, codes, scale, len(flat), columns, len(flat) // len(x),
            flat.stride(0), *strides, eps, CENTERED=centered, WEIGHT=given[0], BIAS=given[1],
            TIMES=given[2], PLUS=given[3], ONE=one, **options(t, dtype),
        )  # fmt: skip
        return codes, scale

    kind = (bucket(len(flat)), columns, centered, *given, one, str(x.dtype), dtype)
    return run(tiles or chosen(_normed, kind, whole_rows(columns), x.device, run))


def _answer(x: Tensor, columns: int, dtype: str) -> tuple[Tensor, Tensor]:
    """What is written."""
    codes = torch.empty((*x.shape[:-1], columns), dtype=TYPES[dtype], device=x.device)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
