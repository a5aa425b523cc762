"""y = x_scale * (x - x_zero) @ (w_scale * codes).T + bias with 8-bit codes.

Constraints: x uint8 (..., K); codes int8 (N, K); x_scale fp32, one element or (..., 1); x_zero an
int or a one-element int32 tensor. CPU: oneDNN. CUDA: `torch._int_mm` (K and N multiples of 8).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...numerics import QTensor
from . import int8_cpu
from .epilogue import finished, in_pieces
from .kernel import INT8_INPUTS, Case, Formats, Kernel, apart, graph_operation
from .quantize_input import MIDDLE, compiling, counted, signed


def reference(
    x: Tensor, x_scale: Tensor, x_zero: Any, codes: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The operation in float64."""
    y = (counted(x, torch.float64) - _number(x_zero, x)) @ (
        w_scale.double()[:, None] * codes.double()
    ).T
    y = y * x_scale.double()
    return y if bias is None else y + bias.double()


def supported(device: torch.device, shape: tuple[int, ...]) -> bool:
    """Whether a kernel executes a weight of `shape` (N, K) on `device`."""
    if device.type == "cpu":
        return int8_cpu.available()
    multiple = shape[0] % 8 == 0 and shape[1] % 8 == 0
    return device.type == "cuda" and multiple and torch.version.hip is None


def pack(codes: Tensor, w_scale: Tensor) -> int8_cpu.PackedLinear | IntLinear:
    """`codes` made ready for the device that they are on."""
    if codes.device.type == "cpu":
        return int8_cpu.PackedLinear(codes, w_scale)
    return IntLinear(codes, w_scale)


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Any,
    packed: Any,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The operation on a packed weight, in `dtype`: sums, scale and bias in fp32, rounded once."""
    rows, scale = x.reshape(-1, x.shape[-1]), x_scale.reshape(-1, 1)
    if int8_cpu.takes(packed, x_scale, x_zero, dtype):
        y = packed(rows, x_zero, x_scale.view(1), bias, dtype)
    else:
        y = in_pieces(lambda q, s: finished(packed(q, x_zero), s, bias, dtype), rows, scale,
                      len(packed.scale), dtype)  # fmt: skip
    return y.unflatten(0, x.shape[:-1]) if x.ndim != 2 else y


class IntLinear:
    """An int8 weight for `torch._int_mm`: at least 17 rows, zero points by the column sums."""

    ROWS = 32
    split = False  # sums are of 32 bits

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.weight = codes.contiguous().t()  # (K, N), column-major as cuBLAS wants it
        self.scale = scale.float()
        self.sums = codes.sum(1, dtype=torch.int32)

    @staticmethod
    def restored(tensors: list[Tensor]) -> IntLinear:
        """What `tensors` are of."""
        found = IntLinear.__new__(IntLinear)
        found.weight, found.scale, found.sums = tensors
        return found

    def __call__(self, x: Tensor, zero: Any) -> Tensor:
        """(x - zero) @ (scale * codes).T in fp32: uint8 (M, K) -> (M, N)."""
        return self.product(signed(x), zero)

    def product(self, rows: Tensor, zero: Any) -> Tensor:
        """The same of x - 128, int8 (M, K)."""
        short = max(0, self.ROWS - rows.shape[0])
        padded = torch.nn.functional.pad(rows, (0, 0, 0, short)) if short else rows
        y = torch._int_mm(padded, self.weight)[: rows.shape[0]]
        if isinstance(zero, Tensor) or zero != MIDDLE:
            y = y - (zero - MIDDLE) * self.sums
        return y.float().mul_(self.scale)

    def codes(self) -> Tensor:
        """The weight that was packed, int8 (N, K)."""
        return self.weight.t()

    def tensors(self) -> list[Tensor]:
        """What is resident."""
        return [self.weight, self.scale, self.sums]


def _number(zero: Any, like: Tensor) -> Any:
    return zero.to(like.device).double() if isinstance(zero, Tensor) else float(zero)


# --- the kernel -----------------------------------------------------------------------------------

SCHEMA = (
    "int8_linear(Tensor x, Tensor x_scale, Tensor? zero, int number, Tensor[] weight, bool split,"
    " Tensor? bias, ScalarType dtype) -> Tensor"
)


def _on_tensors(
    x: Tensor,
    x_scale: Tensor,
    zero: Tensor | None,
    number: int,
    weight: list[Tensor],
    split: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    own = weight[0].is_mkldnn
    packed = int8_cpu.PackedLinear.restored(weight, split) if own else IntLinear.restored(weight)
    return int8_linear(x, x_scale, number if zero is None else zero, packed, bias, dtype)


def _fake(x: Tensor, *args: Any) -> Tensor:
    weight, dtype = args[3], args[-1]
    return x.new_empty((*x.shape[:-1], weight[1].shape[0]), dtype=dtype)


_operation = graph_operation(SCHEMA, _on_tensors, _fake)


def _call(
    x: Tensor, x_scale: Tensor, x_zero: Any, packed: Any, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`int8_linear`; one node of a graph that is being made.

    On CUDA the graph gets its plain operations: Inductor fuses those round the product of codes.
    """
    if _operation is None or not compiling() or isinstance(packed, IntLinear):
        return int8_linear(x, x_scale, x_zero, packed, bias, dtype)
    facts = packed.tensors(), packed.split, bias, dtype
    return _operation(x, x_scale, *apart(x_zero), *facts)


def _reference(
    x: Tensor, x_scale: Tensor, x_zero: Any, weight: QTensor, bias: Tensor | None, geometry: Any
) -> Tensor:
    return reference(x, x_scale, x_zero, weight.codes(), weight.scale, bias)


def _pack(weight: QTensor, geometry: Any) -> Any:
    return pack(weight.codes(), weight.scale)


def _supports(case: Case) -> bool:
    return supported(case.device, case.shape)


KERNEL = Kernel(
    "int8_linear", "linear", Formats(levels=True), INT8_INPUTS, _supports, _pack, _reference, _call
)  # fmt: skip
