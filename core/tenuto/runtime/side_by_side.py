"""Packed weights of layers that share an input, side by side in memory, for one product of all."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model import Backbone
from .kernels.fp8_linear import Float8Linear
from .kernels.int8_linear import IntLinear
from .kernels.joint_linear import lay
from .quantized_layer import QLayer


def lay_side_by_side(denoiser: nn.Module, backbone: Backbone) -> None:
    """Of the layers that share an input, those that compute alike, on a GPU."""
    modules = dict(denoiser.named_modules())
    for subset in backbone.subsets:
        found = [modules.get(name) for name in subset.linears]
        layers = [module for module in found if isinstance(module, QLayer)]
        for kind in (Float8Linear, IntLinear):
            packed = [p for p in map(_packed, layers) if isinstance(p, kind)]
            alike = len({p.weight.shape[0] for p in packed}) == 1
            if alike and len(packed) == len(found) > 1 and lay(packed):
                for layer in layers:
                    layer.packings += 1


def _packed(layer: QLayer) -> Any:
    """The weight that a layer computes with on a GPU, in the one way that it has."""
    if len(layer._packed) != 1 or layer.qdata.device.type != "cuda":
        return None
    (packed,) = layer._packed.values()
    return packed
