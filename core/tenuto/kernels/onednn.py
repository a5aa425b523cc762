"""Integer matrix products by oneDNN's prepacked operators (CPU), exact on every processor.

Processors with VNNI add 8-bit products in 32 bits. Older ones add pairs in 16 bits and saturate
where 2 * 255 * |weight| exceeds 32767. There a product is exact as it is for |weight| <= 64 (4-bit
weights), otherwise as the sum of two products of half the activation: x = floor(x/2) + the rest.
`saturates` finds out by computing a product that would overflow.
"""

from __future__ import annotations

import functools
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


def _halves(x: Tensor, zero: Any) -> list[tuple[Tensor, Any]]:
    """`x` and its zero point as two addends of at most 128 each."""
    low = x >> 1
    zero_low = zero // 2
    return [(low, zero_low), (x - low, zero - zero_low)]


class PackedLinear:
    """An int8 weight (N, K) prepacked for uint8 inputs. A cache: never state, never copied."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.weight = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
        self.scale = scale.float().contiguous()
        self.zero = torch.zeros(len(scale), dtype=torch.int32)
        self.split = saturates() and int(codes.abs().amax()) > SAFE_WEIGHT

    def __call__(self, x: Tensor, zero: Any) -> Tensor:
        """(x - zero) @ (scale * codes).T in fp32: uint8 (..., K) -> (..., N)."""
        parts = _halves(x, zero) if self.split else [(x, zero)]
        outs = [_product(p, z, self.weight, self.scale, self.zero) for p, z in parts]
        return outs[0] if len(outs) == 1 else outs[0].add_(outs[1])

    def codes(self) -> Tensor:
        """The weight that was packed, int8 (N, K)."""
        return self.weight.to_dense().t().contiguous()

    def tensors(self) -> list[Tensor]:
        """What is resident."""
        return [self.weight, self.scale, self.zero]


class PackedConv2d:
    """An int8 weight (O, I / groups, kh, kw) prepacked for uint8 inputs."""

    def __init__(self, codes: Tensor, scale: Tensor, geometry: tuple[Any, ...]) -> None:
        self.geometry = geometry  # stride, padding, dilation, groups
        self.scale = scale.float().contiguous()
        self.zero = torch.zeros(len(scale), dtype=torch.int32)
        pack = torch.ops.onednn.qconv_prepack
        self.weight = pack(codes.contiguous(), self.scale, 1.0, 0, *geometry, None)
        self.split = saturates() and int(codes.abs().amax()) > SAFE_WEIGHT

    def __call__(self, x: Tensor, zero: Any) -> Tensor:
        """The convolution of (x - zero) with scale * codes in fp32: uint8 (B, I, H, W)."""
        parts = _halves(x, zero) if self.split else [(x, zero)]
        outs = [self._one(p, z) for p, z in parts]
        return outs[0] if len(outs) == 1 else outs[0].add_(outs[1])

    def _one(self, x: Tensor, zero: Any) -> Tensor:
        op = torch.ops.onednn.qconv2d_pointwise
        one = torch.ones(1) if isinstance(zero, Tensor) else 1.0
        return (op.tensor if isinstance(zero, Tensor) else op)(
            x.contiguous(memory_format=torch.channels_last), one, zero, self.weight, self.scale,
            self.zero, None, *self.geometry, 1.0, 0, torch.float32, "none", [], ""
        )  # fmt: skip

    def codes(self) -> Tensor:
        """The weight that was packed, int8 (O, I / groups, kh, kw)."""
        return self.weight.to_dense().contiguous()

    def tensors(self) -> list[Tensor]:
        """What is resident."""
        return [self.weight, self.scale, self.zero]
