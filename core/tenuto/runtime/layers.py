"""`QLinear`, `QConv2d`: layers that compute with a quantized weight.

They are torch's own classes too, so that PEFT puts LoRAs round them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels.group_norm import last
from .quantized_layer import QLayer

GEOMETRY = (  # of a Conv2d: what others read
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode", "transposed", "output_padding", "_reversed_padding_repeated_twice",
)  # fmt: skip


class QLinear(QLayer, nn.Linear):  # pyright: ignore
    """A Linear with a quantized weight (N, K)."""

    operation = "linear"

    def __init__(self, layer: nn.Linear, *args: Any, **kwargs: Any) -> None:
        super().__init__(layer, *args, **kwargs)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QConv2d(QLayer, nn.Conv2d):  # pyright: ignore
    """A Conv2d with a quantized weight (O, I / groups, kh, kw)."""

    operation = "conv2d"
    _dims = (1, 2, 3)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """From numbers of channels an nn.Conv2d: PEFT makes a LoRA's factors by a layer's class."""
        if args and isinstance(args[0], int):
            return nn.Conv2d(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, layer: nn.Conv2d, *args: Any, **kwargs: Any) -> None:
        super().__init__(layer, *args, **kwargs)
        self.small = self.shape[2] * self.shape[3] == 1
        for name in GEOMETRY:
            setattr(self, name, getattr(layer, name))
        self.order = torch.channels_last if has_last(layer) else torch.contiguous_format

    def _apply(self, fn: Any, recurse: bool = True) -> QConv2d:
        one = torch.empty(2, 2, 2, 2, dtype=self.dtype)
        first, other = fn(one), fn(one.to(memory_format=torch.channels_last))
        if first.stride() == other.stride():  # a move to one order, whatever was before
            self.order = torch.channels_last if last(other) else torch.contiguous_format
        super()._apply(fn, recurse)
        return self

    def _geometry(self, layer: nn.Conv2d) -> Any:
        assert not isinstance(layer.padding, str)  # such layers stay float
        return layer.stride, layer.padding, layer.dilation, layer.groups

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def kind(self) -> tuple[Any, ...]:
        """Equal for layers that cost the same."""
        return *super().kind(), str(self.geometry)


def has_last(layer: nn.Conv2d) -> bool:
    """Whether a convolution's weight has its channels last in memory, not first."""
    if isinstance(layer, QConv2d):
        return layer.order is torch.channels_last
    return last(layer.weight)
