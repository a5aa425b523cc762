"""LoRAs that ComfyUI has not merged: the weights stay the user's, and nothing of a LoRA is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import schemes
from tenuto.runtime import Patches

NAME = "middle_block.1.transformer_blocks.0.attn1.to_q"
KEY = f"diffusion_model.{NAME}.weight"


def with_lora(model: Any, bias: str | None = None) -> tuple[Any, Tensor]:
    """A clone with a change of one weight as large as a tenth of it, and the change."""
    weight = model.model.diffusion_model.get_parameter(f"{NAME}.weight")
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    change = change * (0.1 * weight.norm() / change.norm())
    found = model.clone()
    assert found.add_patches({KEY: ("diff", (change,))}) == [KEY]
    return found, change


def loaded(model: Any) -> Any:
    """Loaded in parts: what is left out computes with functions of its weights."""
    model.load(torch.device("cpu"), lowvram_model_memory=1)
    return model.model.diffusion_model


def quantized(model: Any, **options: Any) -> Any:
    """The part of a patched clone that has its layers."""
    from comfy_nodes.adapter import ComfyUI

    return ComfyUI().install(model, Patches(scheme=schemes.W8A8, **options)).parts[0]


def test_a_partial_load_with_a_lora_leaves_the_weights_alone(in_comfy: Any) -> None:
    """Functions of core's add to what they are given in place."""
    from comfy_nodes.weights import effective

    model, change = with_lora(in_comfy("unet"))
    denoiser = loaded(model)
    layer = denoiser.get_submodule(NAME)
    assert layer.weight_function, "it was merged: this test says nothing"
    before = layer.weight.detach().clone()
    found = effective(layer)
    assert torch.equal(layer.weight, before)
    assert float((found - before - change).norm() / change.norm()) < 1e-3
    weights = quantized(model)
    weights.token = model.patches_uuid, model.current_hooks
    made = weights.layer(NAME, layer, False)
    assert torch.equal(layer.weight, before)
    assert float((made.weight - found).norm() / found.norm()) < 0.01
    model.detach()
    assert torch.equal(model.model.diffusion_model.get_parameter(f"{NAME}.weight"), before)


def test_a_weight_in_fp8_is_changed_as_core_does(in_comfy: Any) -> None:
    """Core casts to the dtype that it computes in before its functions add to a weight."""
    import comfy.ops

    from comfy_nodes.weights import effective

    model, change = with_lora(in_comfy("unet"))
    layer = loaded(model).get_submodule(NAME)
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    wanted, _ = comfy.ops.cast_bias_weight(layer, torch.zeros(1))
    found = effective(layer)
    assert float((found.float() - wanted).norm() / change.norm()) < 1e-3
    assert layer.weight.dtype is torch.float8_e4m3fn


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_dynamic_vram_leaves_unmerged_is_seen(in_comfy: Any, name: str) -> None:
    """One function of its own, before the list, of the weight and of the bias."""
    from comfy_nodes.weights import effective

    layer = in_comfy("unet").model.diffusion_model.get_submodule("time_embed.0")
    own = getattr(layer, name).detach().clone()
    setattr(layer, f"{name}_lowvram_function", lambda t: t.add_(1))
    setattr(layer, f"{name}_function", [lambda t: t.mul_(2)])
    assert torch.equal(effective(layer, name), (own + 1) * 2)
    assert torch.equal(getattr(layer, name), own)


def test_a_bias_goes_where_its_input_is(in_comfy: Any) -> None:
    """Core keeps on the CPU what it offloads, and hands over inputs of another device."""
    model = in_comfy("unet")
    weights = quantized(model, execution="float")
    name = next(n for n in weights.plan.schemes if n.endswith("emb_layers.1"))
    module = model.model.diffusion_model.get_submodule(name)
    assert isinstance(module, nn.Linear) and module.bias is not None
    from comfy_nodes.weights import Quantized

    weights.on = True
    call = Quantized(weights, name, False, module.in_features)
    x = torch.zeros(2, module.in_features)
    assert call(module.forward, module, x).device.type == "cpu"
    assert call(module.forward, module, x.to("meta")).device.type == "meta"
    assert module.bias.device.type == "cpu" and module.weight.device.type == "cpu"
