"""`quantize_after.py` on CUDA: a program makes whole rows, keeps them in registers, and rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import integer_codes
from .quantize_input import TYPES
from .quantize_input_triton import TILE, TOP, lines, ranged, warps
from .tiles_triton import start


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
def _acted(
    before_ptr, x_ptr, gate_ptr, codes_ptr, scale_ptr, rows, first, columns,
    before_stride, x_stride, gate_stride,
    ROWS: tl.constexpr, WIDE: tl.constexpr, TOP: tl.constexpr, TINY: tl.constexpr,
    WHOLE: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    there, far = (row < rows)[:, None], row.to(tl.int64)[:, None]
    inside = there & (column < columns)[None, :]
    mine = inside & (column >= first)[None, :] if BEFORE else inside
    at = (column - first)[None, :] if BEFORE else column[None, :]
    x = tl.load(x_ptr + far * x_stride + at, mask=mine, other=0.0).to(tl.float32)
    x = _act(x, ACT)
    if GATED:
        x *= tl.load(gate_ptr + far * gate_stride + at, mask=mine, other=0.0).to(tl.float32)
    if BEFORE:
        its = there & (column < first)[None, :]
        place = before_ptr + far * before_stride + column[None, :]
        x = tl.where(mine, x, tl.load(place, mask=its, other=0.0).to(tl.float32))
    value, scale = ranged(x, ROWS, WIDE, TOP, TINY, WHOLE)
    place = codes_ptr + far * columns + column[None, :]
    tl.store(place, value.to(codes_ptr.dtype.element_ty), mask=inside)
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
    before: Tensor | None, x: Tensor, gate: Tensor | None, act: str, dtype: str
) -> tuple[Tensor, Tensor]:
    """`quantize_after.quantize_acted`; x: fp16, bf16 or fp32."""
    flat = lines(x)
    others = [flat if other is None else lines(other) for other in (before, gate)]
    first = 0 if before is None else before.shape[-1]
    columns = first + x.shape[-1]
    codes, scale, options = _answer(x, columns, dtype)
    start(
        _acted, (triton.cdiv(len(flat), options["ROWS"]),), x,
        others[0], flat, others[1], codes, scale, len(flat), first, columns,
        others[0].stride(0), flat.stride(0), others[1].stride(0), ACT=act, GATED=gate is not None,
        BEFORE=before is not None, **options,
    )  # fmt: skip
    return codes, scale


def normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, times: Tensor | None,
    plus: Tensor | None, eps: float, centered: bool, dtype: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`quantize_after.quantize_normed`; x: fp16, bf16 or fp32."""
    flat, columns = lines(x), x.shape[-1]
    codes, scale, options = _answer(x, columns, dtype)
    factors = [flat if t is None else t.contiguous() for t in (weight, bias)]
    moved = [flat if t is None else lines(t) for t in (times, plus)]
    strides = [t.stride(0) if len(t) > 1 else 0 for t in moved]
    start(
        _normed, (triton.cdiv(len(flat), options["ROWS"]),), x,
        flat, *factors, *moved, codes, scale, len(flat), columns, len(flat) // len(x),
        flat.stride(0), *strides, eps, CENTERED=centered, WEIGHT=weight is not None,
        BIAS=bias is not None, TIMES=times is not None, PLUS=plus is not None, **options,
    )  # fmt: skip
    return codes, scale


def _answer(x: Tensor, columns: int, dtype: str) -> tuple[Tensor, Tensor, dict[str, object]]:
    """What is written, and the options that both kernels have."""
    codes = torch.empty((*x.shape[:-1], columns), dtype=TYPES[dtype], device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    wide = triton.next_power_of_2(columns)
    high = max(1, TILE // wide)
    return codes, scale, {
        "ROWS": high, "WIDE": wide, "TOP": TOP[dtype], "TINY": integer_codes.TINY,
        "WHOLE": dtype == "int", "num_warps": warps(high * wide),
    }  # fmt: skip
