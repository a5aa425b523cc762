"""Float weights given up for an artifact's codes: the same images, a LoRA, and what is refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import schemes
from tenuto.caching.interval import LateInterval
from tenuto.errors import ArtifactError, ModelError, TenutoError
from tenuto.model import layers
from tenuto.numerics import QTensor
from tenuto.runtime import Patches

CPU = torch.device("cpu")


def given_up(model: Any, made: Any, **options: Any) -> Any:
    """What is installed in `model`, whose float weights are given up."""
    from comfy_nodes.adapter import ComfyUI
    from comfy_nodes.coded_weights import give_up_

    found = ComfyUI().install(model, Patches(made, execution="float", **options))
    give_up_(model.model.diffusion_model, found.parts[0].plan)
    return found


def image(model: Any, family: str, prompts: Any) -> Tensor:
    """The latents of a run of three steps."""
    import comfy.sample

    text = prompts([1])
    given = [[text, {"pooled_output": text[:, 0].clone(), "num_tokens": text.shape[1]}]]
    size, channels = (36 if family == "pixart" else 8), (4 if family in ("unet", "pixart") else 16)
    empty = torch.zeros(1, channels, size, size)
    noise = comfy.sample.prepare_noise(empty, 3, None)
    with torch.inference_mode():  # as the host runs its nodes
        return comfy.sample.sample(
            model, noise, 3, 1.0, "euler", "simple", given, given, empty, disable_pbar=True, seed=3
        )


def test_the_image_is_that_of_the_artifact(
    in_comfy: Any, coded_artifact: Any, prompts: Any, family: str
) -> None:
    """No float weight of a layer with codes is left in memory, and no second codes."""
    from comfy_nodes.adapter import ComfyUI
    from comfy_nodes.coded_weights import coded, memory_of

    made = coded_artifact(in_comfy(family).model.diffusion_model)
    kept = ComfyUI().install(in_comfy(family), Patches(made, execution="float"))
    wanted = image(kept.handle, family, prompts)
    model = in_comfy(family)
    denoiser = model.model.diffusion_model
    before = {name: weakref.ref(layer.weight) for name, layer in layers(denoiser)}
    floats = sum(t.nbytes for t in (*denoiser.parameters(), *denoiser.buffers()))
    found = given_up(model, made)
    gc.collect()
    held = dict(coded(denoiser))
    assert len(held) == len(kept.parts[0].plan.schemes) > 3
    assert held and all(before[name]() is None for name in held)
    taken, wide = memory_of(denoiser)
    assert wide == floats and taken < 0.65 * wide
    for _ in range(2):
        torch.testing.assert_close(image(found.handle, family, prompts), wanted)
    assert all(weight.content.plain is None for _, weight in coded(denoiser))
    assert {n: w.content.codes.qdata.data_ptr() for n, w in held.items()} == {
        name: found.parts[0].plan.codes[f"{name}.qdata"].data_ptr() for name in held
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_decoded_when_one_looks(dtype: torch.dtype) -> None:
    """Moves keep the codes, casts and operations decode; a copy may be written to, by parts too."""
    from comfy_nodes.coded_weights import CodedWeight, Content

    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    codes = QTensor.nearest(weight, schemes.W8A16.weight)
    places, values = torch.tensor([0, 23]), torch.tensor([7.0, -7.0])
    layer = nn.Linear(4, 6, bias=False)
    content = Content(codes, places, values, kept=True)
    layer.weight = nn.Parameter(CodedWeight(content, dtype, CPU), requires_grad=False)
    wanted = codes.dequantize(dtype)
    wanted[0, 0], wanted[5, 3] = 7, -7
    own = layer.to("cpu").weight
    assert isinstance(own, CodedWeight) and isinstance(own, nn.Parameter)
    assert isinstance(own.detach(), CodedWeight) and isinstance(own.to("cpu"), CodedWeight)
    assert own.shape == weight.shape and own.dtype is dtype and own.nbytes == content.nbytes
    assert type(own.to(torch.float64)) is Tensor
    torch.testing.assert_close(own + 0, wanted)
    torch.testing.assert_close(layer(torch.eye(4, dtype=dtype)), wanted.T)
    assert content.plain is None
    copied = own.to("cpu", copy=True)
    part = copied.narrow(0, 2, 2)
    part += 1
    changed = wanted.clone()
    changed[2:4] += 1
    torch.testing.assert_close(copied + 0, changed)
    torch.testing.assert_close(own + 0, wanted)
    copied *= 2
    torch.testing.assert_close(copied + 0, changed * 2)
    assert content.plain is None
    own.data.copy_(changed)
    torch.testing.assert_close(own + 0, changed)  # what is written to the weight itself counts


def test_a_lora_comes_and_goes(in_comfy: Any, coded_artifact: Any, prompts: Any) -> None:
    """Added to what the codes stand for, in a layer with fused parts; without it, the same bits."""
    made = coded_artifact(in_comfy("sd3").model.diffusion_model)
    model = in_comfy("sd3")
    found = given_up(model, made).handle
    plain = image(found, "sd3", prompts)
    name = "joint_blocks.0.x_block.attn.qkv"
    key = f"diffusion_model.{name}.weight"
    change = torch.randn(128, 128, generator=torch.Generator().manual_seed(5)) * 0.05
    with_lora = found.clone()
    given = {(key, (0, 128, 128)): ("diff", (change,))}
    assert with_lora.add_patches(given)
    changed = image(with_lora, "sd3", prompts)
    reference = in_comfy("sd3").clone()
    from comfy_nodes.adapter import ComfyUI

    kept = ComfyUI().install(reference, Patches(made, execution="float")).handle
    kept.add_patches(given)
    wanted = image(kept, "sd3", prompts)
    size = float((wanted - plain).norm())
    assert float((changed - plain).norm()) > 0.5 * size > 0
    assert float((changed - wanted).norm()) < 0.1 * size
    assert torch.equal(image(found, "sd3", prompts), plain)


def test_schedules_of_the_artifact_fit_afterwards(
    in_comfy: Any, coded_artifact: Any, prompts: Any
) -> None:
    """The model is still known as the artifact's, and another is not; nothing is rounded twice."""
    from comfy_nodes.adapter import ComfyUI
    from comfy_nodes.export import check as for_export

    made = coded_artifact(in_comfy("flux").model.diffusion_model)
    model = in_comfy("flux")
    found = given_up(model, made).handle
    policy = LateInterval(1, 2)
    cached = ComfyUI().install(found, Patches(made, weights=False, policy=policy)).handle
    assert not torch.equal(image(cached, "flux", prompts), image(found, "flux", prompts))
    other = coded_artifact(in_comfy("flux").model.diffusion_model)
    other.header["fingerprint"] = dict(other.header["fingerprint"])
    values = [value + 1 for value in other.header["fingerprint"]["values"]]
    other.header["fingerprint"]["values"] = values
    with pytest.raises(ArtifactError, match="weights differ"):
        ComfyUI().install(found, Patches(other, weights=False, policy=policy))
    for patches in (Patches(made), Patches(scheme=schemes.W8A8)):
        with pytest.raises(ModelError, match="already quantized, by Tenuto Loader"):
            ComfyUI().install(found, patches)
    with pytest.raises(TenutoError, match="Export the model itself"):
        for_export(found)
