"""One file, made in diffusers by the command or by the app, used unchanged in every host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import Artifact, attach
from tenuto.model import families
from tenuto.runtime.layers import QLayer

TIMES = (751, 501, 251, 1)  # of four steps, in diffusers and in ComfyUI's scheduler ddim_uniform
SEED, GUIDANCE, PROMPT = 11, 2.0, "a red bus"
LATENT = 0.18215  # what ComfyUI divides its latents by in the end
UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (320, 320), "layers_per_block": 1,
    "cross_attention_dim": 768, "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}  # fmt: skip
DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1,
}  # fmt: skip


SMALL = UNET | {
    "block_out_channels": (32, 64), "cross_attention_dim": 24,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


@dataclass
class Parts:
    """model: ComfyUI's. facts: of diffusers' class. text: prompts (2, L, D). noise: the first."""

    name: str
    model: Any
    facts: dict[str, Any]
    text: Tensor
    noise: Tensor

    @property
    def denoiser(self) -> nn.Module:
        """ComfyUI's."""
        return self.model.model.diffusion_model

    def in_diffusers(self) -> nn.Module:
        """The same weights in diffusers' class, by the key map."""
        from diffusers import UNet2DConditionModel

        keys, theirs = families.key_map_of(self.denoiser), dict(self.denoiser.named_parameters())
        assert keys is not None
        places = keys.places.items()
        unet = UNet2DConditionModel(**self.facts)
        unet.load_state_dict({n: theirs[p.name].detach().float().clone() for n, p in places})
        return unet.eval()

    def in_ldm(self) -> nn.Module:
        """And in ldm's own U-Net, whose names are ComfyUI's."""
        from ldm.modules.diffusionmodules.openaimodel import UNetModel

        widths = self.facts["block_out_channels"]
        host = UNetModel(
            image_size=8, in_channels=4, out_channels=4, model_channels=widths[0],
            channel_mult=[w // widths[0] for w in widths], num_res_blocks=1, num_heads=8,
            attention_resolutions=[1] if self.name == "small" else [1, 2], legacy=False,
            context_dim=self.facts["cross_attention_dim"], use_spatial_transformer=True,
            use_checkpoint=False,
        )  # fmt: skip
        host.load_state_dict({n: p.float() for n, p in self.denoiser.state_dict().items()})
        return host.eval()


@pytest.fixture(scope="module", params=["small", "loaded"])
def parts(request: pytest.FixtureRequest, checkpoints: Path, in_comfy: Any, prompts: Any) -> Parts:
    """A narrow model, and the tiny checkpoint loaded in this process as the server loads it."""
    from comfy import sample, sd

    with torch.no_grad():
        noise = sample.prepare_noise(torch.zeros(1, 4, 8, 8), SEED)
        if request.param == "small":
            return Parts("small", in_comfy("unet"), SMALL, prompts([-1, 1]), noise)
        path = str(checkpoints / "checkpoints" / "tiny_sd15.safetensors")
        model, clip, _ = sd.load_checkpoint_guess_config(path)[:3]
        encoded = [clip.encode_from_tokens(clip.tokenize(text)) for text in ("", PROMPT)]
        return Parts("loaded", model, UNET, torch.cat(encoded), noise)


@pytest.fixture(scope="module")
def file(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W8A8 with temporal tables and a trained route.

    Of the narrow model by the command, with a range for every token; of the wide one by the app,
    with a range for every step.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pipeline")
    words = Path(os.environ["TENUTO_COMFYUI"]) / "comfy" / "sd1_tokenizer"
    width = parts.facts["cross_attention_dim"]
    text = CLIPTextConfig(
        hidden_size=width, num_hidden_layers=1, intermediate_size=64, num_attention_heads=4
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=64,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, unet=parts.in_diffusers(), text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(words, model_max_length=77),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **DIFFUSION),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("a red bus\na dog\n")

    def tenuto(*words: Any) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tenuto.cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    steps = ("--steps", 4, "--guidance", GUIDANCE)
    first, one = folder / "first.safetensors", folder / "one.safetensors"
    prompts, route = folder / "prompts.txt", ("--iterations", 1, "--reuse", 0.4)
    if parts.name == "small":
        how = ("--scheme", "w8a8", "--temporal", "table", "--prompts", prompts)
        tenuto("quantize", folder / "model", *how, *steps, "--out", first)
        tenuto("train-router", folder / "model", "--artifact", first, *route, "--out", one)
        return one
    in_app({
        "kind": "calibrate", "model": str(folder / "model"), "prompts": str(prompts),
        "scheme": "w8a8-static", "reuse": 0.4, "iterations": 1, "preset": "quick", "steps": 4,
        "guidance": GUIDANCE, "seed": 0, "device": "cpu", "first": str(first), "out": str(one),
    })  # fmt: skip
    picture = folder / "picture.png"
    tenuto("generate", folder / "model", "--prompt", PROMPT, "--artifact", one, "--out", picture)
    assert picture.stat().st_size > 100
    return one


def in_app(request: dict[str, Any]) -> None:
    """What the app's Calibrate starts: its worker, told what to do on standard input."""
    code = "import sys; from tenuto.cli.app import module; sys.exit(module('worker').main())"
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()  # open until the end: the worker stops when it closes
    told = [json.loads(line) for line in worker.stdout]
    worker.stdin.close()
    assert worker.wait(60) == 0 and "result" in told[-1], told[-1]


def sigmas() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = (1 - betas).cumprod(0)
    return ((1 - alphas) / alphas).sqrt()


def by_diffusers(unet: nn.Module, parts: Parts) -> Tensor:
    """Its Euler scheduler round the bare U-Net, as its pipeline does."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**DIFFUSION)
    scheduler.set_timesteps(4)
    assert [round(float(t)) for t in scheduler.timesteps] == list(TIMES)
    x = parts.noise * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(torch.cat([x, x]), t)
        empty, full = unet(given, t, encoder_hidden_states=parts.text).sample.chunk(2)
        x = scheduler.step(empty + GUIDANCE * (full - empty), t, x).prev_sample
    return x


def by_ldm(unet: nn.Module, parts: Parts, told: Any = lambda step: None) -> Tensor:
    """k-diffusion's Euler sampler and wrapper round ldm's U-Net; told(step) at each evaluation."""
    from k_diffusion import external, sampling

    class Model:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alphas_cumprod = (1 - betas).cumprod(0)

        def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return unet(x, t, context=cond)

    wrapped = external.CompVisDenoiser(Model(), quantize=True)

    steps = iter(range(len(TIMES)))

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        told(next(steps))
        both = wrapped(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=parts.text)
        empty, full = both.chunk(2)
        return empty + GUIDANCE * (full - empty)

    levels = torch.cat([sigmas()[list(TIMES)], torch.zeros(1)])
    return sampling.sample_euler(guided, parts.noise * levels[0], levels, disable=True)


def by_comfy(model: Any, parts: Parts) -> Tensor:
    """ComfyUI's guider and Euler sampler, in this process."""
    from comfy import sample, samplers

    own = model.get_model_object("model_sampling").sigmas
    levels = torch.cat([own[list(TIMES)], torch.zeros(1)])
    empty, full = ([[text[None], {}]] for text in parts.text)
    euler, start = samplers.sampler_object("euler"), torch.zeros_like(parts.noise)
    out = sample.sample_custom(
        model,
        parts.noise,
        GUIDANCE,
        euler,
        levels,
        full,
        empty,
        start,
        disable_pbar=True,
        seed=SEED,
    )
    return out * LATENT


def gap(one: Tensor, other: Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


@dataclass
class Seen:
    """What a host made of it: latents with and without, layers, [computed, reused] cells."""

    plain: Tensor
    found: Tensor
    layers: set[str]
    cells: dict[str, list[int]]


def in_place(
    unet: nn.Module, artifact: Artifact, run: Any, parts: Parts, execution: str = "int8"
) -> Seen:
    """Diffusers and ldm: attach, run, detach."""
    plain, keys = run(unet, parts), families.key_map_of(unet)
    with attach(unet, artifact, execution=execution) as attached:
        found, cells = run(unet, parts), attached.counts()
        inside = [n for n, m in unet.named_modules() if isinstance(m, QLayer)]
    assert torch.equal(run(unet, parts), plain)
    return Seen(plain, found, {keys.canonical(n) if keys else n for n in inside}, cells)


def in_webui(artifact: Artifact, parts: Parts, execution: str = "int8") -> Seen:
    """The adapter of A1111, Forge and reForge, on the U-Net that they have."""
    from tenuto.runtime import Patches
    from webui_ext.adapter import WebUI

    unet = parts.in_ldm()
    handle = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))
    plain, keys = by_ldm(unet, parts), families.key_map_of(unet)
    assert keys is not None
    attached = WebUI().install(handle, Patches(artifact, execution=execution))
    found = by_ldm(unet, parts, lambda step: attached.run.evaluates(step, len(TIMES), unet))
    assert attached.weights is not None
    layers = {part for name in attached.weights.kept for part in keys.layers()[name]}
    cells = attached.counts()
    attached.detach()
    assert torch.equal(by_ldm(unet, parts), plain)
    return Seen(plain, found, layers, cells)


def in_comfyui(artifact: Artifact, parts: Parts, execution: str = "int8") -> Seen:
    """ComfyUI's own modules and samplers."""
    from comfy_nodes.adapter import ComfyUI
    from tenuto.runtime import Patches

    plain, keys = by_comfy(parts.model, parts), families.key_map_of(parts.denoiser)
    attached = ComfyUI().install(parts.model, Patches(artifact, execution=execution))
    found = by_comfy(attached.handle, parts)
    weights, cache = attached.parts
    layers = {part for name in weights.kept for part in keys.layers()[name]}
    counts = zip(
        cache.last.computed.sum(0).tolist(), cache.last.reused.sum(0).tolist(), strict=True
    )
    attached.detach()
    assert torch.equal(by_comfy(parts.model, parts), plain)
    return Seen(plain, found, layers, dict(zip(cache.last.names, map(list, counts), strict=True)))


def by_http(server: Any, make: Any, file: Path, parts: Parts) -> Seen:
    """The server's own run of the checkpoint, told by its report."""
    shutil.copyfile(file, server.base / "models" / "tenuto" / "one.safetensors")
    graph = make.plain("sd15", seed=SEED, scheduler="ddim_uniform")
    ours = make.chained(
        graph,
        make.quantize(scheme="from artifact", artifact=["file", 0]),
        make.cache(mode="route of the artifact", artifact=["file", 0], compute_last=False),
    ) | {"file": make.node("Tenuto_LoadArtifact", name="one.safetensors")}
    answered, plain = server.run(ours), server.run(graph)
    told, keys = answered["outputs"]["report"], families.key_map_of(parts.denoiser)
    assert keys is not None
    layers = {part for name in told["layers"] for part in keys.layers()[name]}
    cells = {name: counts for name, *counts in told["cells"]}
    assert f"Quantized layers: {len(layers)} (int8 {len(layers)})" in told["text"][0]
    return Seen(server.latent(plain) * LATENT, server.latent(answered) * LATENT, layers, cells)


def test_one_artifact_in_every_host(server: Any, make: Any, parts: Parts, file: Path) -> None:
    """Equal lists of layers and cells; equal latents where inputs are not rounded, near else.

    Rounding makes a whole code of a difference in the last bit: each host is compared with
    diffusers under the attention that it has itself. In the wide model, whose ranges are stored,
    noise a millionth away moves diffusers' own latents by 0.014; ComfyUI's are 0.005 off.
    """
    from diffusers.models.attention_processor import AttnProcessor

    artifact = Artifact.load(file)
    assert artifact.header["route"]["policy"] and artifact.section("temporal")
    assert tuple(artifact.header["schedule"]["timesteps"]) == TIMES
    seen = {
        "diffusers": in_place(parts.in_diffusers(), artifact, by_diffusers, parts),
        "ldm": in_place(parts.in_ldm(), artifact, by_ldm, parts),
        "webui": in_webui(artifact, parts),
        "comfy": in_comfyui(artifact, parts),
    }
    if parts.name == "loaded":
        seen["server"] = by_http(server, make, file, parts)
    one, other = seen["diffusers"], parts.in_diffusers()
    other.set_attn_processor(AttnProcessor())
    two = in_place(other, artifact, by_diffusers, parts)
    near = 1e-3 if parts.name == "small" else max(8e-3, 3 * gap(two.found, one.found))
    for name, host in seen.items():
        assert host.layers == set(artifact.header["layers"]), name
        held = {n: c for n, c in host.cells.items() if c[1]}
        assert held == {n: c for n, c in one.cells.items() if c[1]} != {}, name
        assert gap(host.plain, one.plain) < 1e-5, name
        assert min(gap(host.found, one.found), gap(host.found, two.found)) < near, name
        assert gap(host.found, host.plain) > 5e-3, "it was not even on"


def test_its_weights_tables_and_schedule_are_exact_in_every_host(parts: Parts, file: Path) -> None:
    """The same codes, dequantized, with inputs as they are: nothing falls from code to code."""
    artifact = Artifact.load(file)
    one = in_place(parts.in_diffusers(), artifact, by_diffusers, parts, "float")
    for name, host in {
        "ldm": in_place(parts.in_ldm(), artifact, by_ldm, parts, "float"),
        "webui": in_webui(artifact, parts, "float"),
        "comfy": in_comfyui(artifact, parts, "float"),
    }.items():
        assert gap(host.found, one.found) < 1e-5, name
        assert host.cells == one.cells and gap(host.found, host.plain) > 5e-3, name
