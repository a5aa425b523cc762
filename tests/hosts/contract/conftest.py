"""What the contract runs on: one bench an adapter, each with the host's own model and samplers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import forge_neo
import pytest
import torch
from torch import Tensor, nn

from tenuto import Artifact, describe, quantize, record, schemes
from tenuto.model import families, patch_of
from tenuto.runtime import InPlace, Patches
from tenuto.sampling import OutputKernel

TIMES = (999, 750, 500, 250)  # of diffusion models on 0..1000; flows take the same on 0..1
LONG = tuple(range(999, 0, -90))  # 12 steps: runs of fewer than nine reuse and skip nothing
BENCHES = (
    "diffusers unet", "ldm unet", "webui unet", "comfy unet", "comfy pixart", "comfy sd3",
    "comfy flux",
)  # fmt: skip
if forge_neo.FORGE is not None:  # one of the hosts' folders at a time
    BENCHES = tuple(f"neo {family}" for family in forge_neo.FAMILIES)
EPS = ("unet", "pixart", "sdxl")  # they predict the noise; the others are flows
UNIT = ("flux", "flux2", "chroma", "qwen_image", "lumina2", "z_image")  # whose time is on 0..1
RISING = ("lumina2", "z_image")  # in diffusers
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


@dataclass(frozen=True)
class Kind:
    """One kind of patches, and the steps of a run in which it does something.

    options: what `Patches` get beside the artifact.
    """

    artifact: Artifact
    times: tuple[int, ...] = TIMES
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def middle(self) -> int:
        """A step in mid-run."""
        return len(self.times) // 2

    def run(self, **facts: Any) -> Settings:
        """The settings of a run."""
        return Settings(**({"times": self.times} | facts))


class Bench:
    """One host with one tiny model. `run(handle, settings)` returns the final latents."""

    def __init__(self, kind: str, make: dict[str, Callable[..., Any]], prompts: Any) -> None:
        self.kind, self.family = kind.split()
        self.make, self.prompts = make, prompts
        self.size = 36 if self.family == "pixart" else 8
        self.dtype = torch.float32
        self.tells = self.kind in (
            "webui",
            "comfy",
            "neo",
        )  # the steps of a run before its first call
        if self.kind == "comfy":
            from comfy_nodes.adapter import ComfyUI

            self.host: Any = ComfyUI()
        elif self.kind in ("webui", "neo"):
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
        made = self.make[self.kind](self.family)
        if self.kind == "neo":
            made.forge_objects.unet.model.computation_dtype = self.dtype
        denoiser = self.host.denoiser(made).to(self.dtype)
        if self.kind == "comfy":
            denoiser.dtype = self.dtype
        return made

    @contextmanager
    def at(self, dtype: torch.dtype) -> Iterator[None]:
        """New handles in half precision: their weights, or their autocast where a host has that."""
        cast = self.kind in ("ldm", "webui")
        with torch.autocast("cpu", dtype, enabled=cast):
            self.dtype = dtype
            yield
        self.dtype = torch.float32

    def clone(self, handle: Any) -> Any:
        """A second handle as this host's users get one."""
        return handle.clone() if self.kind == "comfy" else copy.deepcopy(handle)

    @contextmanager
    def on(self, handle: Any, kind: Kind | Artifact) -> Iterator[Any]:
        """The handle with patches in it, and out again."""
        made = kind if isinstance(kind, Kind) else Kind(kind)
        patches = Patches(made.artifact, execution="int8", **made.options)
        attached = self.host.install(handle, patches)
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
        there = self.kind in ("webui", "neo")
        return attached.weights.plan.clock if there else attached.clock

    def run(self, handle: Any, settings: Settings) -> Tensor:
        """One sampling run by the host's own sampler."""
        with torch.no_grad():
            runs = {"diffusers": _diffusers, "ldm": _ldm, "webui": _webui, "comfy": _comfy}
            runs["neo"] = _neo
            return runs[self.kind](self, handle, settings)

    def noise(self, settings: Settings) -> Tensor:
        """(B, C, H, W); image i has the noise of seed + i."""
        side = settings.size or self.size
        channels = 4 if self.family in EPS else 16
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
        bench, settings, lambda x, t, c: handle(
            x.to(bench.dtype), t, encoder_hidden_states=c.to(bench.dtype)
        ).sample.float(),
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


def _neo(bench: Bench, handle: Any, settings: Settings) -> Tensor:
    """Forge Neo's KModel, predictor and samplers, and the extension's hooks round them."""
    from k_diffusion import sampling

    from webui_ext.forecast import Skips, Watched

    denoiser, predictor = bench.host.denoiser(handle), handle.forge_objects.unet.model.predictor
    flow, family = bench.family not in EPS, bench.family
    times = settings.times[settings.start :]
    known = torch.tensor(times) / 1000 if flow else predictor.sigmas[list(times)]
    sigmas = torch.cat([known, torch.zeros(1)])
    guided = _Guided(bench, settings, lambda x, s, c: forge_neo.denoised(family, handle, x, s, c))
    noise = bench.noise(settings)
    x = noise * sigmas[0] if flow else noise * (1 + sigmas[0] ** 2) ** 0.5
    function = getattr(sampling, f"sample_{settings.sampler}")
    sampler = SimpleNamespace(func=function)
    skips = getattr(patch_of(vars(denoiser).get("forward")), "call", None)
    watched = Watched(handle, sampler, skips.begins) if isinstance(skips, Skips) else None
    try:
        return sampler.func(_Evaluation(denoiser, guided), x, sigmas=sigmas, disable=True)
    finally:
        if watched is not None:
            watched.remove()
        assert sampler.func is function


def _webui(bench: Bench, handle: Any, settings: Settings) -> Tensor:
    """As for ldm's bare U-Net, with a WebUI's callback and its sampler's function."""
    from webui_ext.forecast import Skips, Watched

    denoiser = bench.host.denoiser(handle)
    skips = getattr(patch_of(vars(denoiser).get("forward")), "call", None)

    def watch(sampler: Any) -> Any:
        return Watched(handle, sampler, skips.begins) if isinstance(skips, Skips) else None

    return _ldm(bench, denoiser, settings, watch)


def _ldm(
    bench: Bench, handle: nn.Module, settings: Settings, watch: Callable[[Any], Any] | None = None
) -> Tensor:
    """k-diffusion's own samplers and wrapper round ldm's U-Net, as A1111 has them."""
    from k_diffusion import external, sampling

    class Model:
        alphas_cumprod = _alphas().float()

        def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return handle(x, t, context=cond).float()

    wrapped = external.CompVisDenoiser(Model(), quantize=True)
    guided = _Guided(bench, settings, lambda x, s, c: wrapped(x, s, cond=c))
    sigmas = _sigmas(settings.times)[settings.start :]
    x = bench.noise(settings) * (1 + sigmas[0] ** 2) ** 0.5
    function = getattr(sampling, f"sample_{settings.sampler}")
    model = SimpleNamespace(inner_model=wrapped)
    sampler = SimpleNamespace(func=function, model_wrap_cfg=model)
    watched = watch(sampler) if watch is not None else None
    try:
        return sampler.func(_Evaluation(handle, guided), x, sigmas=sigmas, disable=True)
    finally:
        if watched is not None:
            watched.remove()
        assert sampler.func is function


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
    request: pytest.FixtureRequest, original: Any, in_ldm: Any, in_comfy: Any, in_neo: Any,
    prompts: Any,
) -> Bench:  # fmt: skip
    """Each adapter in turn."""
    make = {"diffusers": original, "ldm": in_ldm, "comfy": in_comfy, "neo": in_neo}
    return Bench(request.param, make, prompts)


WHAT = {"route": (None, 0.5), "weights": ("W8A8", 1.1), "both": ("W8A8_STATIC", 0.5)}


@pytest.fixture(params=[*WHAT, "forecast"])
def made(request: pytest.FixtureRequest, bench: Bench, artifact: Any, forecast: Any) -> Kind:
    """A route, weights, both, a forecast: in turn."""
    known = WHAT.get(request.param)
    return forecast(bench.family) if known is None else Kind(artifact(bench.family, *known))


@pytest.fixture(params=["both", "forecast"])
def some(request: pytest.FixtureRequest, bench: Bench, artifact: Any, forecast: Any) -> Kind:
    """Weights with a route, and a forecast."""
    whole = request.param == "forecast"
    return forecast(bench.family) if whole else Kind(artifact(bench.family))


@pytest.fixture(params=["route", "forecast"])
def eager(request: pytest.FixtureRequest, bench: Bench, artifact: Any, forecast: Any) -> Kind:
    """A route that reuses all that it can, and a forecast."""
    whole = request.param == "forecast"
    return forecast(bench.family) if whole else Kind(artifact(bench.family, None, 0.0))


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
        channels = 4 if family in EPS else 16

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


def kernel(family: str, times: tuple[int, ...] = LONG, width: float = 0.7) -> OutputKernel:
    """Of smooth random outputs, at the timesteps that a family's denoiser gets."""
    unit, flow = (1000 if family in UNIT else 1), family not in EPS
    share = torch.tensor(times, dtype=torch.float64) / 1000
    kept = _alphas()[list(times)]
    alpha, sigma = (1 - share, share) if flow else (kept.sqrt(), (1 - kept).sqrt())
    place = torch.atan2(sigma, alpha)
    values = torch.exp(-(place[:, None] - place).square() / width)
    values = values + 1e-3 * torch.eye(len(times), dtype=torch.float64)
    steps = tuple(t / unit for t in times)
    steps = tuple(1 - t for t in steps) if family in RISING else steps
    kind = "flow" if flow else "eps"
    return OutputKernel(values, steps, tuple(alpha.tolist()), tuple(sigma.tolist()), kind, 2)


@pytest.fixture(scope="session")
def forecast(original: Any) -> Callable[..., Kind]:
    """forecast(family, speedup): nothing but the kernel of 12 steps, made in diffusers."""

    def build(family: str, speedup: float = 2.0) -> Kind:
        known = kernel(family)
        schedule = {"timesteps": list(known.timesteps), "steps": len(LONG), "guidance": 2.0}
        made = Artifact.new(original(family), schedule).add_forecast(known)
        return Kind(made, LONG, {"speedup": speedup})

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
