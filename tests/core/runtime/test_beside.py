"""What users combine with an attached artifact in diffusers: works, or one sentence and no change.

docs/diffusers.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.errors import ModelError
from tenuto.measure.bf16 import WIDE
from tenuto.model import denoiser_of, own_modules, private_copy
from tenuto.runtime import QLayer
from tests.core import tiny_pipelines as small
from tests.core.beside import drawn, gap, route


def test_attaching_twice(tiny: Callable[[str], nn.Module], recorded: Any, bits: Any) -> None:
    model = tiny("pixart")
    artifact = tn.quantize(model, tn.schemes.W8A8, recorded("pixart"))
    with tn.attach(model, artifact):
        before = bits(model)
        for given in (artifact, tn.schemes.W8A8, route(tiny("pixart"), recorded("pixart"))):
            with pytest.raises(ModelError, match=r"attached .* detach\(\) it first"):
                tn.attach(model, given)
        assert bits(model) == before


# --- offloading and casting -----------------------------------------------------------------------

CPU = torch.device("cpu")


def offload(model: Any, how: str) -> None:
    """One way to keep weights elsewhere; the CPU is where they are computed with, too."""
    if how == "model":
        accelerate.cpu_offload_with_hook(model, CPU)
    elif how == "sequential":
        accelerate.cpu_offload(model, CPU, offload_buffers=True)
    elif how == "group":
        places = {"onload_device": CPU, "offload_device": CPU}
        model.enable_group_offload(**places, offload_type="leaf_level")
    else:
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


@pytest.mark.parametrize("how", ["sequential", "group", "casting"])
def test_weights_that_are_elsewhere_are_refused(
    tiny: Callable[[str], nn.Module], recorded: Any, loop: Any, how: str
) -> None:
    """Recording works; what reads weights says in one sentence what to do, and changes nothing."""
    model, trajectory = tiny("flux"), recorded("flux")
    artifact = tn.quantize(model, tn.schemes.W8A8, trajectory)
    offload(model, how)
    found = tn.record(model, sample=loop("flux"), batch=2, runs=1)
    if how != "casting":
        pairs = zip(found.calls, trajectory.calls, strict=False)
        assert all(torch.equal(a.inputs["hidden_states"], b.inputs["hidden_states"])
                   for a, b in pairs)  # fmt: skip
    before = [(name, id(m), sorted(vars(m))) for name, m in model.named_modules()]
    if how == "sequential":  # calibration reads a block at a time
        again = tn.quantize(model, tn.schemes.W8A8, trajectory)
        assert again.header.pop("check")["inputs"] == "float"  # it was not attached
        del artifact.header["check"]
        assert again.header == artifact.header and again.tensors.keys() == artifact.tensors.keys()
        assert all(torch.equal(t, again.tensors[k]) for k, t in artifact.tensors.items())
    else:
        with pytest.raises(ModelError, match="turn it on after attaching"):
            tn.quantize(model, tn.schemes.W8A8, trajectory)
    for ask in (
        lambda: tn.attach(model, artifact),
        lambda: tn.attach(model, tn.schemes.W8A16),
        lambda: tn.compare(model, artifact, sample=loop("flux"), count=2),
        lambda: tn.train_router(model, trajectory, speedup=1.5),
        lambda: private_copy(model),
    ):
        with pytest.raises(ModelError, match="turn it on after attaching"):
            ask()
    assert [(name, id(m), sorted(vars(m))) for name, m in model.named_modules()] == before


@pytest.mark.parametrize("how", ["model", "sequential", "group", "casting"])
def test_offloading_after_attaching(
    tiny: Callable[[str], nn.Module], recorded: Any, loop: Any, how: str
) -> None:
    model = tiny("flux")
    plain = drawn(loop, "flux", model)
    artifact = tn.quantize(model, tn.schemes.W8A8, recorded("flux"), temporal="table")
    attached = tn.attach(model, artifact)
    expected = drawn(loop, "flux", model)
    offload(model, how)
    found = drawn(loop, "flux", model)
    if how == "casting":  # it rounds what is left in float
        assert gap(found, expected) < 0.2
    else:
        assert torch.equal(found, expected)
    attached.detach()
    after = drawn(loop, "flux", model)
    assert gap(after, plain) < 0.2 if how == "casting" else torch.equal(after, plain)


def test_model_offloading_before(tiny: Callable[[str], nn.Module], recorded: Any) -> None:
    """The whole model is moved when it is called: its weights are there."""
    model, trajectory = tiny("flux"), recorded("flux")
    expected = tn.quantize(model, tn.schemes.W8A8, trajectory)
    offload(model, "model")
    found = tn.quantize(model, tn.schemes.W8A8, trajectory)
    assert all(torch.equal(v, expected.tensors[k]) for k, v in found.tensors.items())
    tn.attach(model, found).detach()


# --- bf16 -----------------------------------------------------------------------------------------


class InTheDtypeOfItsTime(nn.Module):
    """Computes in the dtype of its timesteps, as HunyuanDiT and Kandinsky 5 do."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(8, 12)
        parts = ([nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)] for _ in range(2))
        self.layers = nn.ModuleList(nn.Sequential(*part) for part in parts)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = self.step((timestep.reshape(-1, 1) / 1000 * 2.0 ** torch.arange(8)).sin())
        tokens = x.flatten(1).unflatten(1, (-1, 12)) + time[:, None]
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return tokens.view_as(x)


def test_a_comparison_without_bf16_says_why() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = InTheDtypeOfItsTime()

    def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
        x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        for t in (999.0, 500.0):
            x = x - denoiser(x, torch.full((batch,), t)) / 4
        return x.clamp(-1, 1)

    trajectory = tn.record(model, sample=sample, runs=1, batch=2)
    artifact = tn.quantize(model, tn.schemes.W8A8, trajectory)
    found = tn.compare(model, artifact, sample=sample, count=2)
    if found.bf16_arithmetic == WIDE:  # an older processor: the model stays in fp32
        assert found.bf16_floor_psnr_db is not None
        return
    assert found.bf16_floor_psnr_db is None and found.seconds_per_picture["bf16"] is None
    assert found.bf16_arithmetic.startswith("no bf16: ") and "dtype" in found.bf16_arithmetic
    assert "no bf16: " in str(found)


# --- what else is put into a denoiser -------------------------------------------------------------


def image(pipe: Any, **options: Any) -> Tensor:
    """The latent of one image of a small Stable Diffusion."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt="a dog", num_inference_steps=3, generator=torch.Generator().manual_seed(0),
        output_type="latent", **options,
    ).images  # fmt: skip


def dequantized(pipe: Any) -> Any:
    """A pipeline whose denoiser has the weights that an attached one computes with."""
    reference = small.stable_diffusion("StableDiffusionPipeline")
    for name, layer in own_modules(pipe.unet):
        if isinstance(layer, QLayer):
            reference.unet.get_submodule(name).weight.data.copy_(layer.weight)
    return reference


def test_fused_projections(bits: Any) -> None:
    """One sentence names the way back; a cache schedule alone works with them."""
    pipe = small.stable_diffusion("StableDiffusionPipeline")
    pipe.set_progress_bar_config(disable=True)
    trajectory = tn.record(pipe, ["a dog", "two cats"], steps=4, guidance=2.0)
    artifact = tn.quantize(pipe, tn.schemes.W8A8, trajectory)
    pipe.fuse_qkv_projections()
    before = bits(pipe.unet)
    for ask in (
        lambda: tn.attach(pipe, artifact),
        lambda: tn.attach(pipe, tn.schemes.W8A16),
        lambda: tn.quantize(pipe, tn.schemes.W8A8, trajectory),
    ):
        with pytest.raises(ModelError, match=r"unfuse_qkv_projections\(\)"):
            ask()
    assert bits(pipe.unet) == before
    with tn.attach(pipe, route(pipe, trajectory)):
        image(pipe)
    pipe.unfuse_qkv_projections()
    tn.attach(pipe, artifact).detach()


def freeu(pipe: Any) -> dict[str, Any]:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return {}


def processors(pipe: Any) -> dict[str, Any]:
    from diffusers.models.attention_processor import AttnProcessor

    pipe.unet.set_attn_processor(AttnProcessor())
    return {}


def slicing(pipe: Any) -> dict[str, Any]:
    pipe.enable_attention_slicing()
    return {}


def ip_adapter(pipe: Any) -> dict[str, Any]:
    """A random IP-Adapter, loaded as a file's tensors are."""
    draw, width = torch.Generator().manual_seed(3), small.WIDTH
    layers: dict[str, Tensor] = {}
    names = [n for n in pipe.unet.attn_processors if not n.endswith("attn1.processor")]
    for number, name in enumerate(names):
        rows = len(pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.weight)
        for part in ("to_k_ip", "to_v_ip"):
            values = torch.randn(rows, width, generator=draw) / 5
            layers[f"{2 * number + 1}.{part}.weight"] = values
    projection = {
        "proj.weight": torch.randn(4 * width, width, generator=draw),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    pipe.set_ip_adapter_scale(0.7)
    return {"ip_adapter_image_embeds": [torch.ones(2, 1, width)]}


@pytest.mark.parametrize("put", [freeu, processors, slicing, ip_adapter])
def test_equal_to_the_same_on_the_dequantized_model(put: Any) -> None:
    """Before or after attaching; taken out, the float model with it is left."""
    plain, before, after = (small.stable_diffusion("StableDiffusionPipeline") for _ in range(3))
    options = put(plain)
    put(before)
    with tn.attach(before, tn.schemes.W8A16), tn.attach(after, tn.schemes.W8A16):
        put(after)
        reference = dequantized(after)
        put(reference)
        expected = image(reference, **options)
        assert gap(image(before, **options), expected) < 1e-5
        assert gap(image(after, **options), expected) < 1e-5
    for pipe in (before, after):
        assert torch.equal(image(pipe, **options), image(plain, **options))


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_a_compiled_denoiser(how: str) -> None:
    """Recorded, quantized and attached to under its own names; it stays compiled."""
    pipe = small.stable_diffusion("StableDiffusionPipeline")
    pipe.set_progress_bar_config(disable=True)
    trajectory = tn.record(pipe, ["a dog", "two cats"], steps=3, guidance=2.0)
    artifact = tn.quantize(pipe, tn.schemes.W8A16, trajectory)
    with tn.attach(pipe, artifact):
        expected = image(pipe)
    inner = pipe.unet
    if how == "torch.compile":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    compiled = pipe.unet
    found = tn.record(pipe, ["a dog", "two cats"], steps=3, guidance=2.0)
    assert len(found.calls) == len(trajectory.calls)
    assert denoiser_of(pipe) is inner and pipe.unet is compiled
    again = tn.quantize(pipe, tn.schemes.W8A16, trajectory)
    assert again.tensors.keys() == artifact.tensors.keys()
    with tn.attach(pipe, artifact):
        assert gap(image(pipe), expected) < 1e-4
    torch._dynamo.reset()
