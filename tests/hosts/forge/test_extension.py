"""The extension's adapter on Forge Neo's classes: LoRA as Neo applies it, Auto, int8 weights."""

from __future__ import annotations

import importlib
import json
from typing import Any

import forge_neo
import pytest
import torch
from torch import Tensor, nn

from tenuto.errors import ModelError
from webui_ext import hosts
from webui_ext.adapter import Installed, WebUI, branches_of
from webui_ext.choices import OFF, ROUTER, Choices
from webui_ext.forecast import Watched
from webui_ext.plans import chosen_of

SOME = ("unet", "flux", "qwen_image", "z_image", "wan")
W8A8 = Choices(enabled=True, precision="W8A8", cache=OFF)
AUTO = Choices(enabled=True, precision=OFF)
REUSE = Choices(enabled=True, precision=OFF, cache=ROUTER, start=0.0)


def gap(one: Tensor, other: Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


def installed(handle: Any, choices: Choices) -> Installed:
    """What the session puts in for these fields."""
    return WebUI().install(handle, chosen_of(choices, None, OFF, execution="int8"))


class Evaluation(nn.Module):
    """Neo's CFGDenoiser, as far as the extension sees it: the callback, then one call."""

    def __init__(self, family: str, handle: Any, made: Any, steps: int, text: Tensor) -> None:
        super().__init__()
        self.family, self.handle, self.made, self.text = family, handle, made, text
        self.step, self.steps = 0, steps

    def forward(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        if self.made is not None:
            self.made.run.evaluates(self.step, self.steps, self)
        self.step += 1
        return forge_neo.denoised(self.family, self.handle, x, sigma, self.text)


def picture(
    family: str, handle: Any, text: Tensor, made: Any = None, size: int = 8, steps: int = 10
) -> Tensor:
    """One pass by Neo's own Euler."""
    from k_diffusion import sampling

    sampler: Any = type("Sampler", (), {})()
    sampler.func = sampling.sample_euler
    if made is not None and made.skips is not None:
        made.patches.append(Watched(handle, sampler, made.skips.begins))
    predictor = handle.forge_objects.unet.model.predictor
    few = torch.linspace(float(predictor.sigma_max), float(predictor.sigma_min), steps)
    sigmas = torch.cat([few, torch.zeros(1)])
    draw = torch.Generator().manual_seed(0)
    channels = 4 if family in ("unet", "sdxl") else 16
    x = torch.randn(len(text), channels, size, size, generator=draw) * sigmas[0]
    model = Evaluation(family, handle, made, steps, text)
    return sampler.func(model, x, sigmas=sigmas, disable=True)


def strip(denoiser: nn.Module) -> list[str]:
    """What patches would leave behind."""
    return [n for n, m in denoiser.named_modules() if "forward" in vars(m) or m._forward_pre_hooks]


@pytest.mark.parametrize("online", [False, True], ids=["merged", "on the fly"])
@pytest.mark.parametrize("family", SOME)
def test_a_lora_is_as_strong_as_in_full_precision(
    in_neo: Any, prompts: Any, family: str, online: bool
) -> None:
    """Neo merges it into the weight, or adds it where a weight is moved in low VRAM."""
    adapters = importlib.import_module("modules_forge.packages.comfy.weight_adapter")
    handle, text = in_neo(family), prompts([1])
    own: Any = handle.forge_objects.unet
    denoiser: Any = hosts.denoiser_of(handle)
    ends = ("to_q", "img_attn.proj", "attention.qkv", "attn.v", "attn.o")
    names = [n for n, _ in hosts.layers(denoiser) if n.endswith(ends)]
    draw, patches = torch.Generator().manual_seed(2), {}
    for name in names:
        rows, columns = denoiser.get_submodule(name).weight.shape
        up, down = (torch.randn(s, generator=draw) * 0.15 for s in ((rows, 2), (2, columns)))
        adapter = adapters.LoRAAdapter(set(), (up, down, 2.0, None, None, None))
        patches[f"diffusion_model.{name}.weight"] = adapter
    t = torch.full((1,), 600.0)

    def once() -> Tensor:
        x = torch.randn(1, 4 if family == "unet" else 16, 8, 8, generator=torch.Generator())
        return forge_neo.call(family, denoiser, x, t, text)

    def quantized() -> tuple[Tensor, int]:
        made = installed(handle, W8A8)
        made.run.evaluates(0, 1, made)
        try:
            return once(), made.changes.count()
        finally:
            made.detach()

    plain, (base, none) = once(), quantized()
    assert none == 0 and 0 < gap(base, plain) < 0.2
    changed = own.clone()
    assert sorted(changed.add_patches(patches, 1.0, online_mode=online)) == sorted(patches)
    handle.forge_objects.unet = changed
    changed.patch_model(forge_neo.CPU, lowvram_model_memory=1 if online else 0)
    layer = denoiser.get_submodule(names[0])
    assert bool(layer.weight_function) == online != bool(changed.backup)
    full, (both, count) = once(), quantized()
    assert count == len(names) and gap(full, plain) > 0.02
    assert gap(both - base, full - plain) < 0.5, "about what it does in full precision"
    changed.unpatch_model(forge_neo.CPU)
    handle.forge_objects.unet = own
    assert torch.equal(once(), plain) and torch.equal(quantized()[0], base)
    assert not strip(denoiser)


@pytest.mark.parametrize("family", SOME)
def test_auto_skips_calls_in_both_passes(in_neo: Any, prompts: Any, family: str) -> None:
    """The forecast that ships, found by what Neo's predictor says; hires fix is a second pass."""
    handle, text = in_neo(family), prompts([1])
    denoiser = hosts.denoiser_of(handle)
    for size in (8, 12):
        plain = picture(family, handle, text, size=size)
        made = installed(handle, AUTO)
        found = picture(family, handle, text, made, size=size)
        made.detach()
        assert made.skips is not None and made.skips.counts == [5, 5], made.why
        assert not torch.equal(found, plain) and torch.isfinite(found).all()
        assert torch.equal(picture(family, handle, text, size=size), plain)
    assert not strip(denoiser)


# Chroma and Z-Image cannot be made as small as the others: 20 steps would take a minute each.
RULES = [(name, 10) for name in forge_neo.FAMILIES] + [
    (name, 20) for name in forge_neo.FAMILIES if name not in ("chroma", "z_image")
]


@pytest.mark.parametrize(("family", "steps"), RULES)
def test_router_reuses_by_rule(in_neo: Any, prompts: Any, family: str, steps: int) -> None:
    """About half, at any number of steps: a time on 0 to 1 is no row of a table on 0 to 1000."""
    handle, text = in_neo(family), prompts([1])
    plain, made = picture(family, handle, text, steps=steps), installed(handle, REUSE)
    found = picture(family, handle, text, made, steps=steps)
    made.detach()
    cache = made.cache
    assert cache is not None and not torch.equal(found, plain)
    assert 0.3 < cache.reused / (cache.reused + cache.computed) < 0.6
    assert torch.equal(picture(family, handle, text, steps=steps), plain)


def in_int8(family: str, source: nn.Module, facts: dict[str, Any]) -> nn.Module:
    """Neo's own class with int8 layers, as it loads a checkpoint that has them."""
    make = importlib.import_module("backend.operations_mixed_precision").mixed_precision_ops
    made = forge_neo.model_of(family, facts, make({}, compute_dtype=torch.float32))
    tensors = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    said = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    for name in [n for n, m in source.named_modules() if n.endswith(("qkv", "to_q", "_mlp.0"))]:
        weight = tensors[f"{name}.weight"]
        scale = weight.abs().max() / 127
        tensors[f"{name}.weight"] = (weight / scale).round().to(torch.int8)
        tensors |= {f"{name}.weight_scale": scale, f"{name}.comfy_quant": said}
    made.load_state_dict(tensors)
    return made


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_its_own_int8_is_refused_and_the_cache_works(
    in_neo: Any, neo_facts: Any, prompts: Any, family: str
) -> None:
    text = prompts([1])
    denoiser = in_int8(family, hosts.denoiser_of(in_neo(family)), neo_facts(family))
    handle = forge_neo.sd_model_of(family, denoiser)
    said = hosts.objection(denoiser)
    assert said == "Precision is off: the host stores the weights in int8_tensorwise."
    plain = picture(family, handle, text)
    assert gap(plain, picture(family, in_neo(family), text)) < 0.3, "it is the same model"
    for choices in (AUTO, REUSE):
        made = installed(handle, choices)
        found = picture(family, handle, text, made)
        reused = sum(count[1] for count in made.counts().values())
        made.detach()
        assert reused > 0 and not torch.equal(found, plain)
        assert torch.equal(picture(family, handle, text), plain) and not strip(denoiser)


def test_what_is_not_known_skips_whole_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Krea 2, of Neo's own class: nothing in it is quantized or reused, in a sentence."""
    known = ("krea", "SingleStreamDiT", "Krea2")
    monkeypatch.setitem(forge_neo.CLASSES, "krea", known)
    facts = {
        "features": 32, "tdim": 16, "txtdim": 24, "heads": 2, "kvheads": 1, "layers": 1,
        "txtlayers": 2, "txtheads": 2, "txtkvheads": 1,
    }  # fmt: skip
    handle = forge_neo.sd_model_of("krea", forge_neo.model_of("krea", facts))
    denoiser = hosts.denoiser_of(handle)
    said = hosts.objection(denoiser)
    assert said == "Precision is off: Tenuto does not know the parts of a SingleStreamDiT yet."
    with pytest.raises(ModelError, match="does not know the parts"):
        branches_of(denoiser)
    with pytest.raises(ModelError, match="does not know the parts"):
        installed(handle, REUSE)
    made = installed(handle, AUTO)
    assert made.skips is not None and made.cache is None
    made.detach()
    assert not strip(denoiser)
