"""The convolution of x_scale * (x - x_zero) with w_scale * codes, plus bias, with 8-bit codes.

Constraints: x uint8 (B, I, H, W); codes int8 (O, I / groups, kh, kw); zero padding; x_scale fp32,
one element or (B, 1, 1, 1). CPU: oneDNN, never depthwise (slower than float).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import onednn


def reference(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Any,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
) -> Tensor:
    """The operation in float64, returned in fp32."""
    w = codes.double() * w_scale.double().view(-1, 1, 1, 1)
    zero = x_zero.double() if isinstance(x_zero, Tensor) else float(x_zero)
    y = torch.nn.functional.conv2d(x.double() - zero, w, None, *geometry) * x_scale.double()
    return (y if bias is None else y + bias.double().view(-1, 1, 1)).float()


def supported(device: torch.device, shape: tuple[int, ...]) -> bool:
    """Whether a kernel executes a weight of `shape` (O, I / groups, kh, kw) on `device`."""
    return device.type == "cpu" and shape[1] > 1 and onednn.available()


def pack(codes: Tensor, w_scale: Tensor, geometry: tuple[Any, ...]) -> onednn.PackedConv2d:
    """`codes` made ready for their device; geometry: stride, padding, dilation, groups."""
    return onednn.PackedConv2d(
        codes, w_scale, tuple(list(g) if isinstance(g, tuple) else g for g in geometry)
    )


def int8_conv2d(
    x: Tensor, x_scale: Tensor, x_zero: Any, packed: onednn.PackedConv2d, bias: Tensor | None
) -> Tensor:
    """The operation on a packed weight, in fp32."""
    y = packed(x, x_zero).mul_(x_scale)
    return y if bias is None else y.add_(bias.view(-1, 1, 1))
