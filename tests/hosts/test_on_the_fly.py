"""Quantized on the fly, without an artifact: the same layers and the same codes in every host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import attach, schemes
from tenuto.model import key_map_of
from tenuto.numerics import Scheme
from tenuto.runtime import Patches, QLayer

Codes = dict[str, tuple[str, Tensor, Tensor]]


def codes(layers: dict[str, QLayer], denoiser: nn.Module) -> Codes:
    """Scheme, codes and scales of every layer, by canonical name."""
    keys = key_map_of(denoiser)
    found = {}
    for name, layer in layers.items():
        weight = layer.qtensor()
        canonical = keys.canonical(name) if keys else name
        found[canonical] = layer.scheme.name, weight.levels(), weight.scale
    return found


def in_diffusers(unet: nn.Module, scheme: Scheme) -> Codes:
    with attach(unet, scheme, execution="int8"):
        layers = {n: m for n, m in unet.named_modules() if isinstance(m, QLayer)}
        return codes(layers, unet)


def in_comfyui(model: Any, scheme: Scheme) -> Codes:
    from comfy_nodes.adapter import ComfyUI

    part = ComfyUI().install(model, Patches(scheme=scheme, execution="int8")).parts[0]
    denoiser = model.model.diffusion_model
    modules = dict(denoiser.named_modules())
    return codes({n: part.layer(n, modules[n], True) for n in part.plan.schemes}, denoiser)


def in_webui(unet: nn.Module, scheme: Scheme) -> Codes:
    from webui_ext.adapter import WebUI

    handle = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))
    attached = WebUI().install(handle, Patches(scheme=scheme, execution="int8"))
    modules, cpu = dict(unet.named_modules()), torch.device("cpu")
    weights = attached.weights
    found = codes({n: weights.layer(n, modules[n], cpu) for n in weights.plan.schemes}, unet)
    attached.detach()
    return found


@pytest.mark.parametrize("name", ["W8A8", "W6A8", "W4A8", "W8A16"])
def test_equal_layers_and_codes(original: Any, in_ldm: Any, in_comfy: Any, name: str) -> None:
    scheme = getattr(schemes, name)
    one = in_diffusers(original("unet"), scheme)
    assert len(one) > 20
    for other in (in_comfyui(in_comfy("unet"), scheme), in_webui(in_ldm(), scheme)):
        assert other.keys() == one.keys()
        for layer, (kind, levels, scale) in other.items():
            assert kind == one[layer][0], layer
            assert torch.equal(levels, one[layer][1]) and torch.equal(scale, one[layer][2]), layer
