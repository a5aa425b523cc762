"""y = x_scale * (x - x_zero) @ (w_scale * codes).T + bias with 8-bit codes.

Constraints: x uint8 (..., K); codes int8 (N, K); x_scale fp32, one element or (..., 1); x_zero an
int or a one-element int32 tensor. CPU: oneDNN. CUDA: `torch._int_mm` (K and N multiples of 8).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import onednn
from .epilogue import finished, in_pieces
from .quantize_input import MIDDLE


def reference(
    x: Tensor, x_scale: Tensor, x_zero: Any, codes: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The operation in float64, returned in fp32."""
    y = (x.double() - _number(x_zero, x)) @ (w_scale.double()[:, None] * codes.double()).T
    y = y * x_scale.double()
    return (y if bias is None else y + bias.double()).float()


def supported(device: torch.device, shape: tuple[int, ...]) -> bool:
    """Whether a kernel executes a weight of `shape` (N, K) on `device`."""
    if device.type == "cpu":
        return onednn.available()
    multiple = shape[0] % 8 == 0 and shape[1] % 8 == 0
    return device.type == "cuda" and multiple and torch.version.hip is None


def pack(codes: Tensor, w_scale: Tensor) -> onednn.PackedLinear | IntLinear:
    """`codes` made ready for the device that they are on."""
    if codes.device.type == "cpu":
        return onednn.PackedLinear(codes, w_scale)
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
    if onednn.takes(packed, x_scale, x_zero, dtype):
        y = packed(rows, x_zero, x_scale.view(1), bias, dtype)
    else:
        y = in_pieces(lambda q, s: finished(packed(q, x_zero), s, bias, dtype), rows, scale,
                      len(packed.scale), dtype)  # fmt: skip
    return y.unflatten(0, x.shape[:-1]) if x.ndim != 2 else y


class IntLinear:
    """An int8 weight for `torch._int_mm`: at least 17 rows, zero points by the column sums."""

    ROWS = 32

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.weight = codes.contiguous().t()  # (K, N), column-major as cuBLAS wants it
        self.scale = scale.float()
        self.sums = codes.sum(1, dtype=torch.int32)

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


def signed(x: Tensor) -> Tensor:
    """x - 128 as int8, of uint8 codes: the highest bit turned over."""
    return (x ^ MIDDLE).view(torch.int8)


def _number(zero: Any, like: Tensor) -> Any:
    return zero.to(like.device).double() if isinstance(zero, Tensor) else float(zero)
