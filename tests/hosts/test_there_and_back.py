"""Plain, Tenuto, plain: equal bits, with a LoRA, a partial load and an interrupt in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto import schemes
from tenuto.caching import LateInterval
from tenuto.model import layers
from tenuto.runtime import Patches

FAMILIES = ("unet", "sd3", "flux", "qwen_image", "z_image", "wan")
STEPS = 6
QWEN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 64, "out_channels": 16,
    "num_layers": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def qwen_image() -> Any:
    """A tiny one, of random weights."""
    from comfy import supported_models
    from comfy.model_patcher import ModelPatcher

    config = supported_models.QwenImage(dict(QWEN))
    config.set_inference_dtype(torch.float32, None)
    model, draw = config.get_model({}, "").eval(), torch.Generator().manual_seed(0)
    for p in model.diffusion_model.parameters():
        noise = torch.randn(p.shape, generator=draw)
        p.data = noise * p[0].numel() ** -0.5 if p.ndim > 1 else 1 + 0.1 * noise
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


def sampled(model: Any, family: str, prompts: Any, stop: int | None = None) -> Tensor:
    """The latents. stop: the step in which a user interrupts the run."""
    import comfy.sample
    from comfy.model_management import InterruptProcessingException

    text = prompts([1])
    given = [[text, {"pooled_output": text[:, 0].clone(), "num_tokens": text.shape[1]}]]
    frames = (1,) if family in ("wan", "qwen_image") else ()
    empty = torch.zeros(1, 4 if family == "unet" else 16, *frames, 8, 8)

    def step(number: int, *_: Any) -> None:
        if number == stop:
            raise InterruptProcessingException

    noise = comfy.sample.prepare_noise(empty, 3, None)
    return comfy.sample.sample(
        model, noise, STEPS, 2.0, "euler", "simple", given, given, empty, disable_pbar=True,
        seed=3, callback=step,
    )  # fmt: skip


def with_lora(model: Any) -> Any:
    """A clone with a change of every third Linear inside blocks."""
    found, draw = model.clone(), torch.Generator().manual_seed(5)
    wanted = [n for n, m in layers(model.model.diffusion_model) if m.weight.ndim == 2][3::3]
    changes = {}
    for name in wanted:
        shape = model.model.diffusion_model.get_parameter(f"{name}.weight").shape
        change = torch.randn(shape, generator=draw) * 0.2 * shape[1] ** -0.5
        changes[f"diffusion_model.{name}.weight"] = ("diff", (change,))
    assert len(found.add_patches(changes)) == len(wanted) > 0
    return found


def values(model: Any) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.model.diffusion_model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_again_to_the_bit(in_comfy: Any, prompts: Any, family: str, monkeypatch: Any) -> None:
    from comfy import model_management

    from comfy_nodes.adapter import ComfyUI

    model = qwen_image() if family == "qwen_image" else in_comfy(family)
    before, plain = values(model), sampled(model, family, prompts)
    assert plain.isfinite().all()
    tuned = with_lora(model)
    alone = sampled(tuned, family, prompts)
    assert not torch.equal(alone, plain)
    patches = Patches(scheme=schemes.W8A8, policy=LateInterval(2, 2), execution="int8")
    made = ComfyUI().install(tuned, patches)
    changed = sampled(made.handle, family, prompts)
    assert changed.isfinite().all() and not torch.equal(changed, alone)
    with pytest.raises(model_management.InterruptProcessingException):
        sampled(made.handle, family, prompts, stop=3)
    assert torch.equal(sampled(made.handle, family, prompts), changed)
    assert torch.equal(sampled(model, family, prompts), plain)

    part = made.handle.clone()  # loaded in parts: LoRAs of what is left out are not merged
    model_management.unload_all_models()
    load = type(part).load

    def less(self: Any, device_to: Any = None, *_: Any, **__: Any) -> None:
        load(self, device_to, lowvram_model_memory=1)

    with monkeypatch.context() as patch:
        patch.setattr(type(part), "load", less)
        found = sampled(part, family, prompts)
        module = next(
            m for _, m in layers(model.model.diffusion_model) if getattr(m, "weight_function", None)
        )
        assert module.weight_function
    assert float((found - changed).norm() / changed.norm()) < 0.1
    model_management.unload_all_models()
    made.detach()
    assert torch.equal(sampled(tuned, family, prompts), alone)
    assert torch.equal(sampled(model, family, prompts), plain)
    model_management.unload_all_models()
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(model).items())
