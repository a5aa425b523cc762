"""What the contract runs on: one bench an adapter, each with the host's own model and samplers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import Artifact, describe, quantize, record, schemes
from tenuto.model import families
from tenuto.runtime import InPlace, Patches

TIMES = (999, 750, 500, 250)  # of diffusion models on 0..1000; flows take the same on 0..1
BENCHES = (
    "diffusers unet", "ldm unet", "webui unet", "comfy unet", "comfy pixart", "comfy sd3",
    "comfy flux",
)  # fmt: skip
Step = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """Of one sampling run. start: the first step. split: the two halves of guidance apart."""

    sampler: str = "euler"
    seed: int = 0
    batch: int = 1
    times: tuple[int, ...] = TIMES
    start: int = 0
    size: int = 0
    split: bool = False
    on_step: Step | None = None


class Bench:
    """One host with one tiny model. `run(handle, settings)` returns the final latents."""

    def __init__(self, kind: str, make: dict[str, Callable[..., Any]], prompts: Any) -> None:
        self.kind, self.family = kind.split()
        self.make, self.prompts = make, prompts
        self.size = 36 if self.family == "pixart" else 8
        if self.kind == "comfy":
            from comfy_nodes.adapter import ComfyUI

            self.host: Any = ComfyUI()
        elif self.kind == "webui":
            from webui_ext.adapter import WebUI

            self.host = WebUI()
        else:
            self.host = InPlace()

    def fresh(self) -> Any:
        """A new handle with the same weights."""
        if self.kind == "ldm":
            return self.make["ldm"]()
        if self.kind == "webui":  # where A1111's `sd_model` has it
            return SimpleNamespace(model=SimpleNamespace(diffusion_model=self.make["ldm"]()))
        return self.make["comfy" if self.kind == "comfy" else "diffusers"](self.family)

    def clone(self, handle: Any) -> Any:
        """A second handle as this host's users get one."""
        return handle.clone() if self.kind == "comfy" else copy.deepcopy(handle)

    @contextmanager
    def on(self, handle: Any, artifact: Artifact, **options: Any) -> Iterator[Any]:
        """The handle with `artifact` in it, and out again."""
        attached = self.host.install(handle, Patches(artifact, execution="int8", **options))
        try:
            yield attached
        finally:
            attached.detach()

    def counts(self, attached: Any) -> dict[str, list[int]]:
        """[computed, reused] of every branch, by canonical name: of the last run at least."""
        if self.kind != "comfy":
            return attached.counts()
        run = next(part.last for part in attached.parts if part.key == "tenuto_cache")
        found = zip(run.computed.sum(0).tolist(), run.reused.sum(0).tolist(), strict=True)
        return dict(zip(run.names, map(list, found), strict=True))

    def clock(self, attached: Any) -> Any:
        """What the quantized layers go by."""
        if self.kind == "comfy":
            return attached.parts[0].clock
        return attached.weights.plan.clock if self.kind == "webui" else attached.clock

    def run(self, handle: Any, settings: Settings) -> Tensor:
        """One sampling run by the host's own sampler."""
        with torch.no_grad():
            runs = {"diffusers": _diffusers, "ldm": _ldm, "webui": _webui, "comfy": _comfy}
            return runs[self.kind](self, handle, settings)

    def noise(self, settings: Settings) -> Tensor:
        """(B, C, H, W); image i has the noise of seed + i."""
        side = settings.size or self.size
        channels = 16 if self.family in ("sd3", "flux") else 4
        draws = [torch.Generator().manual_seed(settings.seed + i) for i in range(settings.batch)]
        return torch.stack([torch.randn(channels, side, side, generator=g) for g in draws])


def _alphas() -> Tensor:
    """Of Stable Diffusion 1.5."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def _sigmas(times: tuple[int, ...]) -> Tensor:
    found = ((1 - _alphas()) / _alphas()).sqrt()
    return torch.tensor([*(float(found[t]) for t in times), 0.0])


class _Guided:
    """Both halves of guidance, in one call or in two; counts its calls for `on_step`."""

    def __init__(self, bench: Bench, settings: Settings, call: Callable[..., Tensor]) -> None:
        self.settings, self.call, self.count = settings, call, 0
        self.before: Callable[[], None] = lambda: None
        seeds = [settings.seed + i for i in range(settings.batch)]
        self.text = bench.prompts([-1] * settings.batch), bench.prompts(seeds)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.settings.on_step:
            self.settings.on_step(self.count)
        self.count += 1
        self.before()
        if self.settings.split:
            full, empty = (self.call(x, t, text) for text in reversed(self.text))
        else:
            twice = torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, torch.cat(self.text)
            empty, full = self.call(*twice).chunk(2)
        return empty + 2 * (full - empty)


def _diffusers(bench: Bench, handle: nn.Module, settings: Settings) -> Tensor:
    """Diffusers' own scheduler round the bare denoiser, as its pipelines do."""
    import diffusers

    kinds = {"euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler",
             "dpm_2": "KDPM2DiscreteScheduler"}  # fmt: skip
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, kinds[settings.sampler])(**betas)
    if settings.sampler == "dpm_2":
        scheduler.set_timesteps(len(settings.times))
    else:
        scheduler.set_timesteps(timesteps=list(settings.times))
    order = 1 if settings.sampler == "euler" else 2
    steps = scheduler.timesteps[order * settings.start :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(order * settings.start)
    guided = _Guided(
        bench, settings, lambda x, t, c: handle(x, t, encoder_hidden_states=c).sample
    )  # fmt: skip
    first = scheduler.sigmas[order * settings.start]
    x = bench.noise(settings) * (1 + first**2) ** 0.5
    for t in steps:
        eps = guided(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(eps, t, x).prev_sample
    return x


class _Evaluation(nn.Module):
    """A1111's CFGDenoiser: it tells the extension of every evaluation before it calls the model."""

    def __init__(self, denoiser: nn.Module, guided: _Guided) -> None:
        super().__init__()
        hooks = denoiser._forward_pre_hooks.values()
        owners = [getattr(hook, "__self__", None) for hook in hooks]
        self.runs = [owner for owner in owners if hasattr(owner, "evaluates")]
        self.guided, self.step, self.noise = guided, 0, float("inf")
        self.guided.before = self.tell

    def tell(self) -> None:
        """The callback `on_cfg_denoiser`."""
        for run in self.runs:
            how = self.guided.settings
            run.evaluates(self.step, len(how.times) - how.start, self)

    def forward(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        """What a sampler calls; less noise is the next step."""
        if float(sigma[0]) < self.noise < float("inf"):
            self.step += 1
        self.noise = min(self.noise, float(sigma[0]))
        return self.guided(x, sigma)


def _webui(bench: Bench, handle: Any, settings: Settings) -> Tensor:
    """As for ldm's bare U-Net, with a WebUI's callback."""
    return _ldm(bench, bench.host.denoiser(handle), settings)


def _ldm(bench: Bench, handle: nn.Module, settings: Settings) -> Tensor:
    """k-diffusion's own samplers and wrapper round ldm's U-Net, as A1111 has them."""
    from k_diffusion import external, sampling

    class Model:
        alphas_cumprod = _alphas().float()

        def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return handle(x, t, context=cond)

    wrapped = external.CompVisDenoiser(Model(), quantize=True)
    guided = _Guided(bench, settings, lambda x, s, c: wrapped(x, s, cond=c))
    sigmas = _sigmas(settings.times)[settings.start :]
    x = bench.noise(settings) * (1 + sigmas[0] ** 2) ** 0.5
    name = {"dpm_2": "dpm_2"}.get(settings.sampler, settings.sampler)
    sampler = getattr(sampling, f"sample_{name}")
    return sampler(_Evaluation(handle, guided), x, sigmas, disable=True)


def _comfy(bench: Bench, handle: Any, settings: Settings) -> Tensor:
    """ComfyUI's own guider and samplers, with the MODEL loaded and unloaded by itself."""
    from comfy import sample, samplers

    sampling = handle.get_model_object("model_sampling")
    if bench.family in ("sd3", "flux"):
        sigmas = torch.tensor([*(t / 1000 for t in settings.times), 0.0])
    else:
        sigmas = torch.cat([sampling.sigmas[list(settings.times)], torch.zeros(1)])
    conds = []
    for seed in (settings.seed, -1):
        text = bench.prompts([seed])
        conds.append([[text, {"pooled_output": text[:, 0]}]])
    before, model = handle.model.memory_required, handle.model
    if settings.split:
        model.memory_required = lambda *args, **kwargs: 1e30
    noise = bench.noise(settings)

    def callback(step: int, *_: Any) -> None:
        if settings.on_step:
            settings.on_step(step)

    try:
        out = sample.sample_custom(
            handle, noise, 2.0, samplers.sampler_object(settings.sampler),
            sigmas[settings.start :], *conds, torch.zeros_like(noise), callback=callback,
            disable_pbar=True, seed=settings.seed,
        )  # fmt: skip
    finally:
        if settings.split:
            del model.memory_required
        assert model.memory_required == before
    return model.process_latent_in(out)


@pytest.fixture(params=BENCHES)
def bench(
    request: pytest.FixtureRequest, original: Any, in_ldm: Any, in_comfy: Any, prompts: Any
) -> Bench:
    """Each adapter in turn."""
    make = {"diffusers": original, "ldm": in_ldm, "comfy": in_comfy}
    return Bench(request.param, make, prompts)


@pytest.fixture(scope="session")
def settings() -> type[Settings]:
    """The class `Settings`."""
    return Settings


@pytest.fixture(scope="session")
def artifact(original: Any, call_as: Any, prompts: Any) -> Callable[..., Artifact]:
    """artifact(family, weights, share): made in diffusers, once; a route computes `share`."""
    known: dict[Any, Artifact] = {}

    def seen(family: str) -> Any:
        side = 36 if family == "pixart" else 8
        channels = 16 if family in ("sd3", "flux") else 4

        def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
            draw = torch.Generator().manual_seed(seed)
            x = torch.randn(batch, channels, side, side, generator=draw)
            text = prompts(list(range(batch)))
            for t in TIMES:
                step = torch.full((batch,), float(t))
                x = x - 0.2 * call_as(family, denoiser, x, step, text)
            return x[:, :3].clamp(-1, 1)

        return record(original(family), sample=sample, batch=2, runs=1)

    def build(family: str, weights: str | None = "W8A8_STATIC", share: float = 0.5) -> Artifact:
        if (family, weights, share) not in known:
            model = original(family)
            trajectory = known.setdefault(("seen", family), seen(family))
            branches = [b.name for b in describe(model).branches]
            draw = torch.Generator().manual_seed(1)
            table = torch.rand(len(TIMES), len(branches), generator=draw) < share
            table[0] = True
            made = Artifact.new(model, trajectory.schedule())
            made.header["route"] = {
                "timesteps": list(trajectory.timesteps), "branches": branches,
            }  # fmt: skip
            made.tensors["route/table"] = table
            if weights is not None:
                scheme = getattr(schemes, weights)
                made = quantize(model, scheme, trajectory, temporal="table") | made
            known[family, weights, share] = made
        return known[family, weights, share]

    return build


def _bits(module: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    found: dict[str, Any] = {}
    for name, m in module.named_modules():
        hooks = {k: list(v) for k, v in vars(m).items() if k.endswith("_hooks") and v}
        found[name] = id(m), type(m), m.training, "forward" in vars(m), list(m._modules), hooks
    for name, p in [*module.named_parameters(), *module.named_buffers()]:
        found[f"tensor {name}"] = id(p), p.detach().numpy().tobytes()
    return found


@pytest.fixture(scope="session")
def bits() -> Callable[[nn.Module], dict[str, Any]]:
    """bits(module): equal before and after if and only if nothing is left behind."""
    return _bits


__all__ = ["families"]
