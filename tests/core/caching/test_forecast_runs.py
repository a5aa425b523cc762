"""Forecasts in runs of every kind, with tiny pipelines of diffusers' own classes."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tenuto as tn
from tenuto.artifact import Artifact, kernel_of
from tenuto.caching import Forecast, ForecastCalls
from tenuto.model import denoiser_of, watched
from tenuto.sampling import OutputKernel
from tenuto.sampling.noise import is_stochastic
from tests.core import tiny_pipelines as tiny

STEPS = 12
SIZE = {"height": 16, "width": 16}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other libraries
        yield


@pytest.fixture(scope="module")
def pipe(one_thread: None) -> Any:
    return tiny.stable_diffusion("StableDiffusionPipeline")


def recorded(pipe: Any, **options: Any) -> Any:
    return tn.record(pipe, ["a", "b"], steps=STEPS, batch=2, **options)


@pytest.fixture(scope="module")
def artifact(pipe: Any) -> Artifact:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = recorded(pipe, guidance=3.0, call=SIZE)
    return Artifact.new(pipe, found.schedule()).add_forecast(found.kernel)


def latent(pipe: Any, count: int = 1, steps: int = STEPS, **options: Any) -> Tensor:
    seeds = [torch.Generator().manual_seed(i) for i in range(count)]
    given = {"guidance_scale": 3.0, "output_type": "latent", **SIZE, **options}
    prompts = ["a dog", "a cat", "an owl", "a fox"][:count]
    return pipe(prompts, num_inference_steps=steps, generator=seeds, **given).images


def calls_of(attached: Any) -> ForecastCalls:
    calls = (getattr(patch, "call", None) for patch in attached.patches)
    return next(call for call in calls if isinstance(call, ForecastCalls))


def with_scheduler(pipe: Any, scheduler: Any) -> Any:
    return type(pipe)(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False)


# --- guidance -------------------------------------------------------------------------------------


def products(rows: list[Tensor], others: list[Tensor]) -> Tensor:
    a, b = (torch.stack([x.double().flatten() for x in found]) for found in (rows, others))
    return a @ b.T / a.shape[1]


@pytest.mark.parametrize("name", ["sd", "wan", "sd3"])
def test_both_halves_are_kept_whichever_way_they_are_asked_for(name: str) -> None:
    """In one call (SD, SD3) and in two (Wan), at any guidance."""
    pipe, prompts, call = tiny.asked(name)
    outs: list[Tensor] = []
    with watched(denoiser_of(pipe), after=lambda n, a, k, out: outs.append(out[0].clone())):
        kernel = tn.record(pipe, prompts, steps=4, call=call, guidance=2.5, batch=1, runs=1).kernel
    assert kernel is not None and kernel.guidance == pytest.approx(2.5, abs=1e-3)
    if name == "wan":  # the conditional one first
        u, c = outs[1::2], outs[::2]
    else:
        u, c = ([x.chunk(2)[i] for x in outs] for i in (0, 1))
    for guidance in (1.0, 2.5, 6.0):
        guided = [a + guidance * (b - a) for a, b in zip(u, c, strict=True)]
        wanted, found = products(guided, guided), kernel.guided(guidance).values
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    about = kernel.about()
    assert about["of"] == "both halves of guidance"
    again = OutputKernel.of(kernel.stored, about)
    assert torch.equal(again.guided(6.0).values, kernel.guided(6.0).values)


def test_other_guidance_has_one_kernel(pipe: Any) -> None:
    """Of a distilled model, of one that is not guided, and of guidance that is rescaled."""
    found = [
        tn.record(tiny.flux(), ["a"], steps=4, guidance=3.0).kernel,
        tn.record(pipe, ["a"], steps=4, guidance=1.0, call=SIZE).kernel,
        tn.record(pipe, ["a"], steps=4, guidance=9.0, call=SIZE | {"guidance_rescale": 0.7}).kernel,
    ]
    for kernel in found:
        assert kernel is not None and kernel.halves is None
        assert kernel.guided(7.0) is kernel and kernel.about()["of"] == "guided outputs"


@pytest.mark.parametrize(("guidance", "taken"), [(3.0, 3.0), (6.0, 6.0), (1.0, 1.0), (0.0, 1.0)])
def test_a_plan_is_for_the_guidance_of_the_run(
    pipe: Any, artifact: Artifact, guidance: float, taken: float
) -> None:
    with tn.attach(pipe, artifact, speedup=2) as attached:
        latent(pipe, guidance_scale=guidance)
        calls = calls_of(attached)
    kernel = kernel_of(artifact)
    assert kernel is not None and calls.told.guidance == taken
    wanted = Forecast(kernel, 2.0).plan(calls.plan.timesteps, guidance=taken)
    assert calls.plan == wanted
    if guidance == 6.0:
        assert wanted.weights != Forecast(kernel, 2.0).plan(calls.plan.timesteps).weights


def test_a_guidance_that_no_attribute_tells() -> None:
    """PixArt's pipeline has it in its call alone."""
    pipe = tn.demo("transformer")
    pipe.set_progress_bar_config(disable=True)
    steps = [torch.linspace(999, 49, 9).tolist(), 1.0 * torch.eye(9, dtype=torch.float64)]
    noise = torch.linspace(1, 0.1, 9).tolist()
    about = {"timesteps": steps[0], "alpha": noise[::-1], "sigma": noise, "images": 1}
    kernel = OutputKernel.of(
        steps[1].expand(3, 9, 9).clone(), about | {"prediction": "v", "guidance": 2.0}
    )
    made = Artifact.new(pipe, {"timesteps": steps[0], "steps": 9, "guidance": 2.0})
    with tn.attach(pipe, made.add_forecast(kernel), speedup=2) as attached:
        pipe("a dog", num_inference_steps=2, guidance_scale=4.5, output_type="latent",
             use_resolution_binning=False, clean_caption=False)  # fmt: skip
        assert calls_of(attached).told.guidance == 4.5


def test_an_artifact_of_one_kernel_is_read_as_before(pipe: Any, artifact: Artifact) -> None:
    facts = {
        k: v for k, v in artifact.header["forecast"].items() if k not in ("of", "guidance", "noise")
    }
    kernel = kernel_of(artifact)
    assert kernel is not None
    old = Artifact(artifact.header | {"forecast": facts}, {"forecast/kernel": kernel.values})
    old.validate()
    with tn.attach(pipe, old, speedup=2) as attached:
        latent(pipe, guidance_scale=6.0)
        assert attached.counts()[""] == [6, 6]
        wanted = Forecast(kernel, 2.0).plan(calls_of(attached).plan.timesteps)
        assert calls_of(attached).plan.computed == wanted.computed


# --- noise ----------------------------------------------------------------------------------------


def test_eta_skips_nothing_and_is_no_kernel(pipe: Any, artifact: Artifact) -> None:
    with tn.attach(pipe, artifact, speedup=2) as attached:
        latent(pipe, eta=0.5)
        assert attached.counts()[""] == [12, 0]
        latent(pipe)
        assert attached.counts()[""] == [18, 6]
    assert recorded(pipe, guidance=3.0, call=SIZE | {"eta": 0.5}).kernel is None


ASKED = {  # they add noise where a call or their config says so, and this is looked at
    "DDIMScheduler", "DDIMParallelScheduler", "EulerDiscreteScheduler", "EDMEulerScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
}  # fmt: skip


def test_no_scheduler_of_diffusers_adds_noise_unnoticed() -> None:
    found = set()
    for name in dir(diffusers.schedulers):
        kind = getattr(diffusers.schedulers, name)
        module = getattr(kind, "__module__", "")  # of what needs another library: a dummy's
        if not (module.startswith("diffusers.schedulers.") and name.endswith("Scheduler")):
            continue
        source = inspect.getsource(inspect.getmodule(kind))
        if "randn" in source or "Brownian" in source:
            found.add(name)
            unseen = not is_stochastic(object.__new__(kind))
            assert not unseen or name in ASKED, name
    assert len(found) > 15


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("EulerAncestralDiscreteScheduler", {}), ("KDPM2AncestralDiscreteScheduler", {}),
        ("DDPMScheduler", {}), ("SASolverScheduler", {}),
    ],
)  # fmt: skip
def test_a_sampler_with_noise_of_its_own_skips_nothing(
    pipe: Any, artifact: Artifact, name: str, options: dict[str, Any]
) -> None:
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    other = with_scheduler(pipe, scheduler)
    with tn.attach(other, artifact, speedup=2) as attached:
        latent(other)
        assert attached.counts()[""][1] == 0


# --- runs of every kind ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("HeunDiscreteScheduler", 23),
        ("KDPM2DiscreteScheduler", 23),
        ("UniPCMultistepScheduler", 12),
    ],
)
def test_solvers_of_second_order(pipe: Any, artifact: Artifact, name: str, calls: int) -> None:
    """Heun asks twice at a timestep, KDPM2 in between too: about half is skipped, in both calls."""
    other = with_scheduler(pipe, getattr(diffusers, name).from_config(pipe.scheduler.config))
    full = latent(other)
    with tn.attach(other, artifact, speedup=2) as attached:
        found, counts = latent(other), attached.counts()[""]
        again = latent(other)
    assert sum(counts) == calls and calls * 0.35 <= counts[1] <= calls * 0.65
    assert torch.equal(found, again) and not torch.equal(found, full)
    assert float((found - full).square().mean()) < float(full.square().mean())


@pytest.mark.parametrize(("strength", "counts"), [(0.3, [6, 0]), (0.6, [6, 6]), (0.9, [9, 9])])
def test_image_to_image_is_a_shorter_run(
    pipe: Any, artifact: Artifact, strength: float, counts: list[int]
) -> None:
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    with tn.attach(other, artifact, speedup=2) as attached:
        found = other(
            "a dog", image=tiny.picture(16, 16), strength=strength, num_inference_steps=20,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        assert attached.counts()[""] == counts and bool(found.isfinite().all())
        plan = calls_of(attached).plan
    assert len(plan.timesteps) == sum(counts) and plan.timesteps[0] < 999 * strength + 60


def test_guidance_in_two_calls() -> None:
    pipe, prompts, call = tiny.asked("wan")
    found = tn.record(pipe, prompts, steps=STEPS, call=call, guidance=2.0, batch=1, runs=1)
    made = Artifact.new(pipe, found.schedule()).add_forecast(found.kernel)
    with torch.no_grad(), tn.attach(pipe, made, speedup=2) as attached:
        found.rollout()(denoiser_of(pipe), 5, 1)
        assert attached.counts()[""] == [12, 12]
        assert calls_of(attached).told.guidance == 2.0


@pytest.mark.parametrize("count", [2, 4])
def test_a_batch_is_its_images_one_by_one(pipe: Any, artifact: Artifact, count: int) -> None:
    with tn.attach(pipe, artifact, speedup=2) as attached:
        together = latent(pipe, count)
        assert attached.counts()[""] == [6, 6]
        one = latent(pipe)
    assert torch.allclose(together[:1], one, rtol=1e-2, atol=1e-2 * float(one.abs().max()))


def test_sizes_change_and_a_run_is_left(pipe: Any, artifact: Artifact) -> None:
    class Left(Exception):
        pass

    def leave(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 7:
            raise Left
        return kwargs

    with tn.attach(pipe, artifact, speedup=2) as attached:
        clean = latent(pipe)
        with pytest.raises(Left):
            latent(pipe, callback_on_step_end=leave)
        assert torch.equal(latent(pipe), clean)
        before = attached.counts()[""]
        latent(pipe, height=32, width=16)
        assert [a - b for a, b in zip(attached.counts()[""], before, strict=True)] == [6, 6]
        assert torch.equal(latent(pipe), clean)


def test_a_run_within_a_run_is_one_of_its_own(pipe: Any, artifact: Artifact) -> None:
    """Another pipeline of the same denoiser, called between two steps: of other timesteps."""
    inner = with_scheduler(pipe, type(pipe.scheduler).from_config(pipe.scheduler.config))
    wanted, made = latent(inner, steps=7), list[Tensor]()

    def between(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            made.append(latent(inner, steps=7))
        return kwargs

    with tn.attach(pipe, artifact, speedup=2):
        found = latent(pipe, callback_on_step_end=between)
        alone = latent(pipe)
    assert bool(found.isfinite().all()) and bool(alone.isfinite().all())
    assert torch.allclose(made[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(artifact: Artifact, pipe: Any, dtype: torch.dtype) -> None:
    half = tiny.stable_diffusion("StableDiffusionPipeline").to(dtype)
    found = recorded(half, guidance=3.0, call=SIZE)
    assert found.kernel is not None and found.kernel.guidance == pytest.approx(3.0, rel=0.03)
    made = Artifact.new(half, found.schedule()).add_forecast(found.kernel)
    with tn.attach(half, made, speedup=2) as attached:
        out = latent(half)
        assert attached.counts()[""] == [6, 6]
    with tn.attach(pipe, artifact, speedup=2):
        exact = latent(pipe)
    assert out.dtype is dtype
    assert float((out - exact).square().mean()) < 0.1 * float(exact.square().mean())


# --- what reads along -----------------------------------------------------------------------------


def test_a_hook_inside_computes_and_is_told_once(
    pipe: Any, artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    with tn.attach(pipe, artifact, speedup=2) as attached:
        with watched(pipe.unet, ["mid_block"], after=lambda *_: None):
            latent(pipe)
        assert attached.counts()[""] == [6, 6]  # Tenuto's own know of skipped calls
        hook = pipe.unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
        with caplog.at_level(logging.WARNING, "tenuto"):
            latent(pipe)
            latent(pipe)
        hook.remove()
        assert attached.counts()[""] == [30, 6] and len(seen) == 24
        assert sum("reads along" in r.message for r in caplog.records) == 1
        latent(pipe)
        assert attached.counts()[""] == [36, 12]


def test_self_attention_guidance_computes(pipe: Any, artifact: Artifact) -> None:
    parts = pipe.components
    other = diffusers.StableDiffusionSAGPipeline(**parts, requires_safety_checker=False)
    seeds = torch.Generator().manual_seed(0)
    with tn.attach(other, artifact, speedup=2) as attached:
        given = {"generator": seeds, "height": 64, "width": 64}  # it blurs what is not smaller
        other("a dog", num_inference_steps=STEPS, output_type="latent", **given)
        assert attached.counts()[""] == [24, 0]


def test_perturbed_attention_guidance_keeps_nothing(pipe: Any, artifact: Artifact) -> None:
    other = diffusers.StableDiffusionPAGPipeline(
        **pipe.components, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    with tn.attach(other, artifact, speedup=2) as attached:
        found = latent(other, pag_scale=2.0)
        assert attached.counts()[""] == [6, 6]
        assert torch.equal(found, latent(other, pag_scale=2.0))
