"""Integer matrix products by oneDNN's prepacked operators (CPU), exact on every processor.

Processors with VNNI add 8-bit products in 32 bits. Older ones add pairs in 16 bits and saturate
where 2 * 255 * |weight| exceeds 32767. There a product is exact as it is for |weight| <= 64 (4-bit
weights), otherwise as the sum of two products of half the activation: x = floor(x/2) + the rest.
`saturates` finds out by computing a product that would overflow.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

SAFE_WEIGHT = 64  # 2 * 255 * 64 fits 16 bits


@functools.cache
def available() -> bool:
    """Whether this build of torch executes the prepacked int8 operators (checked by doing it)."""
    try:
        q = torch.ops.onednn
        ones = torch.ones(4, 16, dtype=torch.uint8)
        packed = q.qlinear_prepack(torch.ones(8, 16, dtype=torch.int8), None)
        out = _product(ones, 1, packed, torch.ones(8), torch.zeros(8, dtype=torch.int32))
        return "tensor" in q.qlinear_pointwise.overloads() and bool((out == 0).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


@functools.cache
def saturates() -> bool:
    """Whether 255 * 127 summed over 256 products comes out too small on this processor."""
    x = torch.full((4, 256), 255, dtype=torch.uint8)
    w = torch.full((16, 256), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(w, None)
    out = _product(x, 0, packed, torch.ones(16), torch.zeros(16, dtype=torch.int32))
    return not bool((out == 255 * 127 * 256).all())


def _product(x: Tensor, zero: Any, packed: Tensor, w_scale: Tensor, w_zero: Tensor) -> Tensor:
    tail = (None, 1.0, 0, torch.float32, "none", [], "")
    one = torch.ones(1) if isinstance(zero, Tensor) else 1.0
    op = torch.ops.onednn.qlinear_pointwise
    return (op.tensor if isinstance(zero, Tensor) else op)(
        x, one, zero, packed, w_scale, w_zero, *tail
    )


@functools.cache
def writes_bf16() -> bool:
    """Whether a product comes out in bf16 at full speed: older processors take the slow way."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def _halves(x: Tensor, zero: Any) -> list[tuple[Tensor, Any]]:
    """`x` and its zero point as two addends of at most 128 each."""
    low = x >> 1
    zero_low = zero // 2
    return [(low, zero_low), (x - low, zero - zero_low)]


class _Packed:
    """An int8 weight prepacked for uint8 inputs. A cache: never state, never copied."""

    weight: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.scale = scale.float().contiguous()
        self.zero = torch.zeros(len(scale), dtype=torch.int32)
        self.split = saturates() and int(codes.abs().amax()) > SAFE_WEIGHT

    @classmethod
    def restored(cls, tensors: list[Tensor], split: bool, **facts: Any) -> _Packed:
        """What `tensors` are of, with the other facts of it: a graph has no objects."""
        found = cls.__new__(cls)
        found.weight, found.scale, found.zero = tensors
        found.__dict__.update(facts, split=split)
        return found

    def __call__(
        self,
        x: Tensor,
        zero: Any,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The operation on scale * (x - zero) and the weight, plus bias, in fp32 or bf16.

        x: uint8. zero: an int, or one int32 element. scale: one fp32 element, or None for 1.
        """
        if not self.split:
            return self._one(x, zero, scale, bias, dtype)
        (low, low_zero), (high, high_zero) = _halves(x, zero)
        one = self._one(low, low_zero, scale, bias, torch.float32)
        return one.add_(self._one(high, high_zero, scale, None, torch.float32)).to(dtype)

    @abstractmethod
    def _one(
        self, x: Tensor, zero: Any, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """One product."""

    def tensors(self) -> list[Tensor]:
        """What is resident."""
        return [self.weight, self.scale, self.zero]


class PackedLinear(_Packed):
    """An int8 weight (N, K): (..., K) -> (..., N)."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(codes, scale)
        self.weight = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)

    def _one(
        self, x: Tensor, zero: Any, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        op, pair = _overload(torch.ops.onednn.qlinear_pointwise, scale, zero)
        tail = (1.0, 0, dtype, "none", [], "")
        return op(x, *pair, self.weight, self.scale, self.zero, bias, *tail)

    def codes(self) -> Tensor:
        """The weight that was packed, int8 (N, K)."""
        return self.weight.to_dense().t().contiguous()


class PackedConv2d(_Packed):
    """An int8 weight (O, I / groups, kh, kw): (B, I, H, W) -> (B, O, H', W'), channels last."""

    def __init__(self, codes: Tensor, scale: Tensor, geometry: tuple[Any, ...]) -> None:
        super().__init__(codes, scale)
        self.shape = tuple(codes.shape)
        self.geometry = geometry  # stride, padding, dilation, groups
        pack = torch.ops.onednn.qconv_prepack
        self.weight = pack(codes.contiguous(), self.scale, 1.0, 0, *geometry, None)

    def _one(
        self, x: Tensor, zero: Any, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        op, pair = _overload(torch.ops.onednn.qconv2d_pointwise, scale, zero)
        x = x.contiguous(memory_format=torch.channels_last)
        weight, tail = (self.weight, self.scale, self.zero), (1.0, 0, dtype, "none", [], "")
        return op(x, *pair, *weight, bias, *self.geometry, *tail)

    def codes(self) -> Tensor:
        """The weight that was packed, int8 (O, I / groups, kh, kw)."""
        return self.weight.to_dense().contiguous()


def takes(packed: Any, scale: Tensor, zero: Any, dtype: torch.dtype) -> bool:
    """Whether scale and bias go into the operator, and `dtype` comes out of it: stored ranges."""
    stored = isinstance(packed, _Packed) and isinstance(zero, Tensor) and scale.numel() == 1
    return stored and (dtype is torch.float32 or (dtype is torch.bfloat16 and writes_bf16()))


def _overload(op: Any, scale: Tensor | None, zero: Any) -> tuple[Any, tuple[Any, Any]]:
    """The overload that takes this zero point, and scale and zero point as it takes them."""
    if not isinstance(zero, Tensor):
        return op, (1.0 if scale is None else float(scale), zero)
    return op.tensor, (torch.ones(1) if scale is None else scale, zero)
