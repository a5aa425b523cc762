"""`int8_conv2d.py` in one kernel on CUDA: no patches are stored, scales and bias are inside.

Constraints: CUDA with Triton, compute capability 8.0 or newer; x 8-bit codes (B, C, H, W); codes
int8 (O, C, kh, kw), C a multiple of 16, one group; zero padding; x_scale fp32, one element or
(B, 1, 1, 1). It reads and writes channels last: x in another order is turned over before and after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...numerics import QTensor
from . import int8_conv2d, int8_fused
from .int8_conv2d import layout
from .kernel import INT8_INPUTS, Case, Formats, Kernel, graph_operation
from .quantize_input import compiling

STEP = 16  # bytes that a thread reads at once


class Filters:
    """An int8 weight with its channels innermost, (O, kh, kw, C), and the sums of its filters."""

    def __init__(self, codes: Tensor, scale: Tensor, geometry: tuple[Any, ...]) -> None:
        self.weight = codes.permute(0, 2, 3, 1).contiguous()
        self.scale = scale.float()
        self.sums = codes.flatten(1).sum(1, dtype=torch.int32)
        self.geometry = [list(sizes) for sizes in geometry[:3]]

    def codes(self) -> Tensor:
        """The weight that was packed, int8 (O, C, kh, kw)."""
        return self.weight.permute(0, 3, 1, 2).contiguous()

    def tensors(self) -> list[Tensor]:
        """What is resident."""
        return [self.weight, self.scale, self.sums]


def call(
    x: Tensor, x_scale: Tensor, x_zero: Any, packed: Filters, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The operation on a packed weight, in `dtype`, laid out as `x`; one node of a graph."""
    codes, scale, zero = int8_fused.plain(x.permute(0, 2, 3, 1), x_scale, x_zero)
    codes = codes.view(x.shape[0], *x.shape[2:], x.shape[1])
    run = _operation if _operation is not None and compiling() else _on_tensors
    y = run(codes, scale, zero, *packed.tensors(), bias, *packed.geometry, dtype)
    return y.permute(0, 3, 1, 2).contiguous(memory_format=layout(x))


# --- the kernel -----------------------------------------------------------------------------------

SCHEMA = (
    "int8_conv2d_fused(Tensor x, Tensor x_scale, Tensor? zero, Tensor weight, Tensor w_scale,"
    " Tensor sums, Tensor? bias, int[] stride, int[] padding, int[] dilation, ScalarType dtype)"
    " -> Tensor"
)


def _on_tensors(
    x: Tensor, x_scale: Tensor, zero: Tensor | None, weight: Tensor, *rest: Any
) -> Tensor:
    from .int8_conv2d_fused_triton import conv2d

    w_scale, sums, bias, *geometry, dtype = rest
    return conv2d(x, x_scale, zero, weight, w_scale, sums, bias, dtype, tuple(geometry))


def _fake(x: Tensor, x_scale: Tensor, zero: Any, weight: Tensor, *rest: Any) -> Tensor:
    size = int8_conv2d.out_size(x.shape[1:3], weight.shape[1:3], rest[3:6])
    return x.new_empty((x.shape[0], *size, weight.shape[0]), dtype=rest[-1])


_operation = graph_operation(SCHEMA, _on_tensors, _fake)


def _pack(weight: QTensor, geometry: Any) -> Filters:
    return Filters(weight.codes(), weight.scale, geometry)


def _supports(case: Case) -> bool:
    fits = case.geometry[-1] == 1 and case.shape[1] % STEP == 0
    return fits and int8_fused.supported(case.device)


KERNEL = Kernel(
    "int8_conv2d_fused", "conv2d", Formats(), INT8_INPUTS, _supports, _pack,
    int8_conv2d.KERNEL.reference, call, priority=1, any_bias=True,
)  # fmt: skip
