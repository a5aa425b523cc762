"""`int8_fused.py` for weights that stay packed: two codes a byte, ranges in groups or one a row.

A pass before the product unpacks a layer's weight into a buffer that lives for the call, so that a
model's weights take little more than a quarter of their size in 16 bits, not half. Constraints:
those of the product; weights of 4 bits or less, as `QTensor` stores them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...numerics import QTensor
from . import int8_fused
from .kernel import INT8_INPUTS, Formats, Kernel, graph_operation
from .quantize_input import compiling


class IntFour:
    """A weight of 4-bit codes (N, K) as a file has it, and the sums of its rows as int8 codes."""

    def __init__(self, weight: QTensor) -> None:
        assert weight.zero_point is not None
        self.weight, self.zero = weight, weight.zero_point
        self.sums = weight.codes().flatten(1).sum(1, dtype=torch.int32)

    def codes(self) -> Tensor:
        """The int8 codes that the product takes, (N, K)."""
        return self.weight.codes()

    def tensors(self) -> list[Tensor]:
        """What is resident beside the ranges, which are the layer's own."""
        return [self.weight.qdata, self.sums]


def call(
    x: Tensor, x_scale: Tensor, x_zero: Any, packed: IntFour, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The operation on a packed weight, in `dtype`; one node of a graph that is being made."""
    q = packed.weight
    facts = q.qdata, q.scale, packed.sums, packed.zero, q.step, q.group
    run = _operation if _operation is not None and compiling() else _on_tensors
    y = run(*int8_fused.plain(x, x_scale, x_zero), *facts, bias, dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], len(q.scale))


# --- the kernel -----------------------------------------------------------------------------------

SCHEMA = (
    "int4_fused(Tensor x, Tensor x_scale, Tensor? zero, Tensor weight, Tensor w_scale, Tensor sums,"
    " Tensor w_zero, Tensor? step, int group, Tensor? bias, ScalarType dtype) -> Tensor"
)


def _on_tensors(
    x: Tensor, x_scale: Tensor, zero: Tensor | None, weight: Tensor, w_scale: Tensor, sums: Tensor,
    w_zero: Tensor, step: Tensor | None, group: int, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from .int4_fused_triton import unpacked
    from .product_triton import linear

    codes = unpacked(weight, w_zero, step, x.shape[1], group)
    return linear(x, x_scale, zero, codes, w_scale, sums, bias, dtype)


def _fake(x: Tensor, x_scale: Tensor, zero: Any, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=rest[-1])


_operation = graph_operation(SCHEMA, _on_tensors, _fake)


def _pack(weight: QTensor, geometry: Any) -> IntFour:
    return IntFour(weight)


KERNEL = Kernel(
    "int4_fused", "linear", Formats(bits=(2, 3, 4)), INT8_INPUTS, int8_fused.KERNEL.supports, _pack,
    int8_fused.KERNEL.reference, call, priority=2, any_bias=True,
)  # fmt: skip
