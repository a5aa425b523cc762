"""bf16 layers on a CPU with a weight that is packed once; torch's own pack it at every call.

y = x W^T + b, or the convolution, with bf16 operands and sums in fp32: the same bits as `F.linear`
and `F.conv2d`. Constraints: no gradient, no graph being made, a processor with fast bf16 products.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .int8_cpu import writes_bf16
from .quantize_input import compiling


@functools.cache
def available() -> bool:
    """Whether this build of torch packs and computes (checked by doing it)."""
    try:
        x, w = torch.ones(4, 32, dtype=torch.bfloat16), torch.ones(8, 32, dtype=torch.bfloat16)
        image, kernel = x.view(1, 32, 2, 2), w.view(8, 32, 1, 1)
        same = torch.equal(PackedLinear(w, x)(x, None), F.linear(x, w))
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        wide = PackedConv2d(kernel, geometry, image)(image, None)
        return writes_bf16() and same and torch.equal(wide, F.conv2d(image, kernel))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False


def supported(x: Tensor) -> bool:
    """Whether a layer computes with a packed weight on `x`."""
    if x.device.type != "cpu" or x.dtype is not torch.bfloat16 or compiling():
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and x.numel() > 0 and available()


def pack(weight: Tensor, x: Tensor, geometry: Any = None) -> Any:
    """A weight in bf16 packed for inputs like `x`; geometry: that of a convolution."""
    return PackedLinear(weight, x) if weight.ndim == 2 else PackedConv2d(weight, geometry, x)


class PackedLinear:
    """A weight (N, K) in bf16, packed for inputs like `x`. A cache: never state, never copied."""

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        rows = x.numel() // x.shape[-1]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., K) -> (..., N)."""
        op = torch.ops.mkldnn._linear_pointwise
        return op(x.contiguous(), self.weight, bias, "none", [], "")


class PackedConv2d:
    """A weight (O, I / groups, kh, kw) in bf16. geometry: stride, padding, dilation, groups."""

    def __init__(self, weight: Tensor, geometry: tuple[Any, ...], x: Tensor) -> None:
        stride, padding, dilation, groups = geometry
        self.geometry = (list(padding), list(stride), list(dilation), groups)
        pack = torch.ops.mkldnn._reorder_convolution_weight
        self.weight = pack(weight.contiguous(), *self.geometry, list(x.shape))

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W'), laid out in memory as `x`: the operator turns it."""
        op = torch.ops.mkldnn._convolution_pointwise
        y = op(x, self.weight, bias, *self.geometry, "none", [], "")
        return y.contiguous() if x.is_contiguous() else y
