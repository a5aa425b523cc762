"""value * act(gate) in one operation, where [value, gate] is what a product of 8-bit codes gives.

    gated_int8, gated_fp8              the values, in 16 or 32 bits
    gated_int8_rows, gated_fp8_rows    their codes and scales, for a layer that is quantized too
A feed-forward with a gate (GEGLU, SwiGLU) makes both halves by one layer. In the product's kernel
neither is ever written to memory. Operations of compiled graphs, see `fused_gate.py`; on CUDA a
kernel of Triton does it (`gated_product_triton.py`) where that is faster than a product and a pass
after it. `first`: the gate is the first half. Sums are fp32, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernel import graph_operation
from .quantize_after import ACTS
from .quantize_input import PER_ROW, TYPES, has_float8, signed, triton_runs


def reference(y: Tensor, act: str, first: bool) -> Tensor:
    """The operation in fp32: y (M, 2 N) -> (M, N)."""
    value, gate = y.float().chunk(2, -1)
    if first:
        value, gate = gate, value
    return value * ACTS[act](gate)


def _int8(
    x: Tensor, x_scale: Tensor, zero: Tensor | None, weight: Tensor, w_scale: Tensor, sums: Tensor,
    bias: Tensor | None, act: str, first: bool, dtype: torch.dtype, rows: str = "",
) -> Any:  # fmt: skip
    if x.device.type == "cuda" and triton_runs(x.device.index):
        from .gated_product_triton import fastest
        from .product_triton import linear

        own = x, x_scale, zero, weight.t(), w_scale, sums, bias
        return fastest(lambda: linear(*own, dtype), *own, act, first, dtype, rows)
    middle = 0 if zero is None else zero.float() - 128
    y = (x.float() - middle) @ weight.float() * w_scale * x_scale
    return _answer(y if bias is None else y + bias.float(), act, first, dtype, rows)


def _fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, act: str,
    first: bool, dtype: torch.dtype, rows: str = "",
) -> Any:  # fmt: skip
    def product() -> Tensor:
        return torch._scaled_mm(
            x, weight, scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=dtype,
            use_fast_accum=True,
        )  # fmt: skip

    index = x.device.index
    if x.device.type != "cuda" or not (triton_runs(index) and has_float8(index)):
        return _answer(product(), act, first, dtype, rows)
    from .gated_product_triton import fastest

    own = x, x_scale, None, weight.t(), w_scale[0], None, bias
    return fastest(product, *own, act, first, dtype, rows)


def _answer(y: Tensor, act: str, first: bool, dtype: torch.dtype, rows: str) -> Any:
    found = reference(y, act, first).to(dtype)
    if not rows:
        return found
    codes, scale = PER_ROW[rows](found)
    return signed(codes) if rows == "int" else codes, scale


def _fake(x: Tensor, *rest: Any) -> Tensor:
    dtype = next(t for t in rest if isinstance(t, torch.dtype))
    return x.new_empty((x.shape[0], _columns(rest)), dtype=dtype)


def _fake_rows(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    codes = x.new_empty((x.shape[0], _columns(rest)), dtype=TYPES[rest[-1]])
    return codes, x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _columns(given: tuple[Any, ...]) -> Any:
    """Of the result: half of the weight's, which is the first matrix of 8-bit codes."""
    weight = next(t for t in given if isinstance(t, Tensor) and t.ndim == 2 and t.dtype in _CODES)
    return weight.shape[1] // 2


_CODES = set(TYPES.values())


def _operations(name: str, operands: str, call: Callable[..., Any]) -> tuple[Any, Any]:
    given = f"{operands}, str act, bool first, ScalarType dtype"
    whole = graph_operation(f"{name}({given}) -> Tensor", call, _fake)
    codes = f"{name}_rows({given}, str rows) -> (Tensor, Tensor)"
    return whole, graph_operation(codes, call, _fake_rows)


gated_int8, gated_int8_rows = _operations(
    "gated_int8",
    "Tensor x, Tensor x_scale, Tensor? zero, Tensor weight, Tensor w_scale, Tensor sums,"
    " Tensor? bias",
    _int8,
)
gated_fp8, gated_fp8_rows = _operations(
    "gated_fp8", "Tensor x, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias", _fp8
)
