"""Layers that share an input: they choose together, and one product can serve all of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model import Backbone
from .execution import lay_together
from .quantized_layer import QLayer


def make_siblings(denoiser: nn.Module, backbone: Backbone, on: bool = True) -> None:
    """Let layers that share an input and are alike know of each other; on: False forgets it."""
    for group in _sharing(denoiser, backbone):
        alike = {(type(one), one.scheme, one.wanted, one.shape[1], one.rotation) for one in group}
        for one in group:
            one.siblings = tuple(group) if on and len(alike) == 1 and len(group) > 1 else ()


def lay_side_by_side(denoiser: nn.Module, backbone: Backbone) -> None:
    """The packed weights of layers that share an input and compute alike, on a GPU, in memory."""
    for group in _sharing(denoiser, backbone):
        packed = [_packed(one) for one in group]
        if len(group) > 1 and all(packed):
            lay_together(packed, group)


def _sharing(denoiser: nn.Module, backbone: Backbone) -> list[list[QLayer]]:
    """The quantized layers that share an input, where all of them are."""
    modules = dict(denoiser.named_modules())
    groups = [[modules.get(name) for name in subset.linears] for subset in backbone.subsets]
    return [
        [one for one in group if isinstance(one, QLayer)]
        for group in groups
        if all(isinstance(one, QLayer) for one in group)
    ]


def _packed(layer: QLayer) -> Any:
    """The weight that a layer computes with on a GPU, in the one way that it has."""
    if len(layer._packed) != 1 or layer.qdata.device.type != "cuda":
        return None
    (packed,) = layer._packed.values()
    return packed
