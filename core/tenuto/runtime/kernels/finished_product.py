"""residual + gate * y in one operation, where y is what a product of 8-bit codes gives.

    finished_int8   after `int8_fused`
    finished_fp8    after `_scaled_mm` by row, in bf16
A block adds what its layers give to what it was given, each image's columns times a gate of its
own. In the product's kernel this costs no pass over memory. Two operations of compiled graphs, see
`fused_residual.py`; on CUDA a kernel of Triton does it (`product_triton.py`) where that is faster
than a product and a pass after it. Sums are fp32, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernel import graph_operation
from .quantize_input import has_float8, triton_runs


def reference(y: Tensor, gate: Tensor | None, residual: Tensor) -> Tensor:
    """The operation in fp32: y (M, N), residual (..., N) of M rows.

    gate: (N,), or (B or 1, 1, ..., N): one row for all of an image, or of every image.
    """
    y = y.float().view(residual.shape)
    return residual.float() + (y if gate is None else gate.float() * y)


def _finished_int8(
    x: Tensor, x_scale: Tensor, zero: Tensor | None, weight: Tensor, w_scale: Tensor, sums: Tensor,
    bias: Tensor | None, gate: Tensor | None, residual: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if x.device.type == "cuda" and triton_runs(x.device.index):
        from .finished_product_triton import fastest
        from .product_triton import linear

        own = x, x_scale, zero, weight.t(), w_scale, sums, bias
        return fastest(lambda: linear(*own, dtype), *own, gate, residual, dtype)
    middle = 0 if zero is None else zero.float() - 128
    y = (x.float() - middle) @ weight.float() * w_scale * x_scale
    y = y if bias is None else y + bias.float()
    return reference(y, gate, residual).to(dtype)


def _finished_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None,
    gate: Tensor | None, residual: Tensor,
) -> Tensor:  # fmt: skip
    def product() -> Tensor:
        return torch._scaled_mm(
            x, weight, scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=residual.dtype,
            use_fast_accum=True,
        )  # fmt: skip

    index = x.device.index
    if x.device.type != "cuda" or not (triton_runs(index) and has_float8(index)):
        return reference(product(), gate, residual).to(residual.dtype)
    from .finished_product_triton import fastest

    own = x, x_scale, None, weight.t(), w_scale[0], None, bias
    return fastest(product, *own, gate, residual, residual.dtype)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    residual = rest[-1] if isinstance(rest[-1], Tensor) else rest[-2]
    return residual.new_empty(residual.shape)


finished_int8 = graph_operation(
    "finished_int8(Tensor x, Tensor x_scale, Tensor? zero, Tensor weight, Tensor w_scale,"
    " Tensor sums, Tensor? bias, Tensor? gate, Tensor residual, ScalarType dtype) -> Tensor",
    _finished_int8,
    _fake,
)
finished_fp8 = graph_operation(
    "finished_fp8(Tensor x, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias,"
    " Tensor? gate, Tensor residual) -> Tensor",
    _finished_fp8,
    _fake,
)
