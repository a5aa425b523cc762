"""y = x_scale * (x - x_zero) @ (w_scale * codes).T + bias in one kernel.

Constraints: CUDA with Triton, compute capability 8.0 or newer; x 8-bit codes (..., K), codes int8
(N, K), any shape; x_scale fp32, one element or (..., 1). See `int8_linear.py` for the same by
cuBLAS, whose product takes its scales in passes of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...numerics import QTensor
from . import int8_linear
from .int8_linear import IntLinear
from .kernel import INT8_INPUTS, Case, Formats, Kernel, apart, graph_operation
from .quantize_input import MIDDLE, compiling, signed, triton_runs


def supported(device: torch.device) -> bool:
    """Whether the kernel runs on `device`."""
    return device.type == "cuda" and triton_runs(device.index)


def fused_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Any,
    packed: IntLinear,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The operation on a packed weight, in `dtype`; one node of a graph that is being made."""
    call = operation if operation is not None and compiling() else on_tensors
    y = call(*plain(x, x_scale, x_zero), *packed.tensors(), bias, dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], packed.scale.shape[0])


def plain(x: Tensor, x_scale: Tensor, x_zero: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """An input as the operations take it: int8 rows, scales (M, 1) or (1, 1), None for 128."""
    zero, number = apart(x_zero)
    if zero is None and number != MIDDLE:
        zero = torch.full((1,), number, dtype=torch.int32, device=x.device)
    return signed(x).reshape(-1, x.shape[-1]), x_scale.reshape(-1, 1), zero


# --- the kernel -----------------------------------------------------------------------------------

SCHEMA = (
    "int8_fused(Tensor x, Tensor x_scale, Tensor? zero, Tensor weight, Tensor w_scale,"
    " Tensor sums, Tensor? bias, ScalarType dtype) -> Tensor"
)


def on_tensors(
    x: Tensor, x_scale: Tensor, zero: Tensor | None, weight: Tensor, w_scale: Tensor, *rest: Any
) -> Tensor:
    """The operation; weight: int8 (K, N), column by column. rest: sums, bias, dtype."""
    from .product_triton import linear

    sums, bias, dtype = rest
    return linear(x, x_scale, zero, weight.t(), w_scale, sums, bias, dtype)


def _fake(x: Tensor, x_scale: Tensor, zero: Any, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=rest[-1])


operation = graph_operation(SCHEMA, on_tensors, _fake)


def _pack(weight: QTensor, geometry: Any) -> IntLinear:
    return IntLinear(weight.codes(), weight.scale)


def _supports(case: Case) -> bool:
    return supported(case.device)


KERNEL = Kernel(
    "int8_fused", "linear", Formats(levels=True), INT8_INPUTS, _supports, _pack,
    int8_linear.KERNEL.reference, fused_linear, priority=1, any_bias=True,
)  # fmt: skip
