"""For the same noise levels, the same plan: in diffusers, in ComfyUI and in the WebUI adapter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tenuto as tn
from tenuto.artifact import Artifact
from tenuto.artifact.host_names import canonicalized, localized
from tenuto.caching import ForecastCalls, ForecastPlan
from tenuto.runtime import Patches
from tenuto.sampling import OutputKernel
from tests.core import tiny_pipelines as tiny

STEPS, WIDTH, ZERO = 20, 24, torch.zeros(1)


def alphas() -> Tensor:
    """Of Stable Diffusion 1.5."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def kernel(flow: bool, unit: float = 1.0) -> OutputKernel:
    """Of smooth random outputs at 20 even steps."""
    times = torch.linspace(999, 20, STEPS).round().long()
    share, kept = times.double() / 1000, alphas()[times]
    alpha, sigma = (1 - share, share) if flow else (kept.sqrt(), (1 - kept).sqrt())
    place = torch.atan2(sigma, alpha)
    values = torch.exp(-(place[:, None] - place).square() / 0.7)
    values = values + 1e-3 * torch.eye(STEPS, dtype=torch.float64)
    kind, steps = "flow" if flow else "eps", tuple((times / unit).tolist())
    return OutputKernel(values, steps, tuple(alpha.tolist()), tuple(sigma.tolist()), kind, 2)


def artifact(model: Any, known: OutputKernel) -> Artifact:
    schedule = {"timesteps": list(known.timesteps), "steps": STEPS, "guidance": 2.0}
    return canonicalized(Artifact.new(model, schedule).add_forecast(known), model)


def in_diffusers(pipe: Any, known: OutputKernel | None, **call: Any) -> tuple[ForecastPlan, Tensor]:
    """The plan of a run of a pipeline at half of its calls, and the sigmas of that run."""
    made = None if known is None else artifact(pipe, known)
    with tn.attach(pipe, made, speedup=2) as attached:
        pipe("a", generator=torch.Generator().manual_seed(0), output_type="latent", **call)
        found = [getattr(patch, "call", None) for patch in attached.patches]
        (calls,) = (call for call in found if isinstance(call, ForecastCalls))
        return calls.plan, pipe.scheduler.sigmas.clone()


def in_comfyui(
    model: Any, known: OutputKernel | None, sigmas: Tensor, channels: int
) -> ForecastPlan:
    """The plan of a run of a MODEL by ComfyUI's own sampler."""
    from comfy import sample, samplers

    from comfy_nodes.adapter import ComfyUI

    made = None if known is None else artifact(model.model.diffusion_model, known)
    attached, plans = ComfyUI().install(model, Patches(made, speedup=2.0)), []
    cache = attached.parts[-1]
    text = torch.zeros(1, 5, WIDTH)
    cond = [[text, {"pooled_output": text[:, 0]}]]
    noise = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    sample.sample_custom(
        attached.handle, noise, 1.0, samplers.sampler_object("euler"), sigmas, cond, cond,
        torch.zeros_like(noise), disable_pbar=True, seed=0,
        callback=lambda *_: plans.append(cache.run.cells[""].plan),
    )  # fmt: skip
    assert [int(n) for n in cache.last.computed[:, 0]] == [int(c) for c in plans[-1].computed]
    attached.detach()
    return plans[-1]


def in_webui(unet: Any, known: OutputKernel | None, sigmas: Tensor) -> ForecastPlan:
    """The plan of a run of A1111: k-diffusion's function in its sampler, and its wrapper."""
    from k_diffusion import external, sampling

    from webui_ext.adapter import WebUI
    from webui_ext.forecast import Watched

    model = SimpleNamespace(
        alphas_cumprod=alphas().float(), apply_model=lambda x, t, cond: unet(x, t, context=cond)
    )
    wrapped: Any = external.CompVisDenoiser(model)
    sd_model = SimpleNamespace(
        model=SimpleNamespace(diffusion_model=unet), alphas_cumprod=alphas().float(),
        parameterization="eps",
    )  # fmt: skip
    sampler: Any = SimpleNamespace(func=sampling.sample_euler)
    sampler.model_wrap_cfg = SimpleNamespace(inner_model=wrapped)
    made = None if known is None else artifact(unet, known)
    attached = WebUI().install(sd_model, Patches(made, speedup=2.0))
    watched = Watched(sd_model, sampler, attached.skips.begins)
    step = 0

    def denoised(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        nonlocal step
        attached.run.evaluates(step, len(sigmas) - 1, wrapped)
        step += 1
        return wrapped(x, sigma, cond=torch.zeros(1, 5, WIDTH))

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    sampler.func(denoised, noise, sigmas=sigmas, disable=True)
    watched.remove()
    plan = attached.skips.calls.plan
    assert attached.counts() == {"": [plan.calls, len(sigmas) - 1 - plan.calls]}
    attached.detach()
    return plan


def compare(found: ForecastPlan, wanted: ForecastPlan, most: float = 1e-6) -> None:
    assert found.computed == wanted.computed and found.taps == wanted.taps
    assert 0 < wanted.calls < len(wanted.computed)
    for mine, theirs in zip(found.weights, wanted.weights, strict=True):
        assert mine == pytest.approx(theirs, abs=most, rel=most)


def stable_diffusion(**config: Any) -> Any:
    from diffusers import EulerDiscreteScheduler

    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    pipe.scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config
    )
    return pipe


TIMES = [
    torch.linspace(999, 20, STEPS).round().long().tolist(),
    torch.linspace(990, 5, 14).round().long().tolist(),
    torch.linspace(700, 1, 30).round().long().tolist(),  # image to image
]


@pytest.mark.parametrize("shipped", [False, True], ids=["artifact", "no artifact"])
@pytest.mark.parametrize(
    ("times", "most"), zip(TIMES, (6e-4, 1e-4, 1.7e-2), strict=True),
    ids=["as recorded", "other steps", "a later start"],
)  # fmt: skip
def test_noise(times: list[int], most: float, shipped: bool, in_comfy: Any, in_ldm: Any) -> None:
    """A kernel that ships is looked up by noise: what float32 rounds of it moves the weights.

    Of 1 - alpha^2 it is up to 6e-6, at the last steps, and steps that lie close amplify it: weights
    up to 4 were 2e-4, 3e-5 and 6e-3 off. most: three times as much.
    """
    known, most = (None, most) if shipped else (kernel(False), 1e-6)
    wanted, sigmas = in_diffusers(
        stable_diffusion(), known, timesteps=times, height=16, width=16, guidance_scale=1.0
    )
    assert wanted.timesteps == tuple(times)
    compare(in_comfyui(in_comfy("unet"), known, sigmas, 4), wanted, most)
    compare(in_webui(in_ldm(), known, sigmas), wanted, most)


def test_noise_levels_between_two_timesteps(in_comfy: Any, in_ldm: Any) -> None:
    """Those of Karras et al.: A1111 has fractional timesteps as diffusers, ComfyUI whole ones."""
    known = kernel(False)
    wanted, sigmas = in_diffusers(
        stable_diffusion(use_karras_sigmas=True), known, num_inference_steps=STEPS, height=16,
        width=16, guidance_scale=1.0,
    )  # fmt: skip
    compare(in_webui(in_ldm(), known, sigmas), wanted, 1e-5)  # found 3e-6
    near = in_comfyui(in_comfy("unet"), known, sigmas, 4)
    assert near.timesteps == pytest.approx(wanted.timesteps, abs=0.51)
    assert near.calls == wanted.calls


@pytest.mark.parametrize("shipped", [False, True], ids=["artifact", "no artifact"])
@pytest.mark.parametrize("steps", [STEPS, 12])
def test_flow(steps: int, shipped: bool, in_comfy: Any) -> None:
    """Diffusers' timesteps are 1000 sigmas in float32: 3e-8 off, and so the weights.

    By 7.5e-7 with an artifact and 7.1e-6 without; three times as much is allowed.
    """
    known = None if shipped else kernel(True, 1000)
    wanted, sigmas = in_diffusers(tiny.flux(), known, num_inference_steps=steps)
    compare(in_comfyui(in_comfy("flux"), known, sigmas, 16), wanted, 2.2e-5 if shipped else 2.3e-6)


def test_a_model_that_counts_the_other_way(original: Any, in_comfy: Any) -> None:
    """Lumina 2's time rises in diffusers and falls in ComfyUI, and so do the kernel's steps."""
    from comfy_nodes.adapter import ComfyUI

    known = kernel(True, 1000)
    risen = OutputKernel(
        known.values, tuple(1 - t for t in known.timesteps), known.alpha, known.sigma, "flow", 2
    )
    model = in_comfy("lumina2")
    made = artifact(original("lumina2"), risen)
    there = localized(made, model.model.diffusion_model).header["forecast"]["timesteps"]
    assert there == pytest.approx(known.timesteps)
    attached = ComfyUI().install(model, Patches(made, speedup=2.0))
    assert attached.parts[-1].plan.kernel.timesteps == pytest.approx(known.timesteps)


def test_which_samplers_add_noise(in_comfy: Any) -> None:
    """By running each one of ComfyUI's with two seeds: what differs adds noise."""
    from comfy import sample, samplers

    from comfy_nodes.cache import is_stochastic

    model, text = in_comfy("unet"), torch.zeros(1, 5, WIDTH)
    sigmas = torch.cat([model.get_model_object("model_sampling").sigmas[[999, 600, 300]], ZERO])
    noise, cond = torch.ones(1, 4, 8, 8), [[text, {}]]

    def latent(sampler: Any, seed: int) -> Tensor:
        return sample.sample_custom(
            model, noise, 2.0, sampler, sigmas.clone(), cond, cond, torch.zeros_like(noise),
            disable_pbar=True, seed=seed,
        )  # fmt: skip

    wrong, noisy = [], 0
    for name in samplers.SAMPLER_NAMES:
        sampler = samplers.sampler_object(name)
        found = not torch.equal(latent(sampler, 1), latent(sampler, 2))
        noisy += found
        if found != is_stochastic(sampler):
            wrong.append(name)
    assert not wrong and 0 < noisy < len(samplers.SAMPLER_NAMES)
    assert is_stochastic(samplers.ksampler("euler", {"s_churn": 0.5}))
    assert not is_stochastic(samplers.ksampler("euler_ancestral", {"eta": 0.0}))
