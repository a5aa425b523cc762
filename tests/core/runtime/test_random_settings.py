"""Pipelines at settings nobody chose: an artifact is on as it says, and off as if it had not been.

Forty settings of family, scheduler, steps, guidance, image or text, batch and dtype, by number.
What is compared: the latents of a pipeline before and after an artifact was attached, and with one
attached that has no quantized layer and a schedule that computes everything: every bit is equal.
Quantized, each image differs; there the calls that were reused are counted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import tenuto as tn
from tenuto.artifact import schedule_of
from tenuto.caching import CacheSchedule, LateInterval
from tenuto.caching.schedule import SHORTEST
from tenuto.model import denoiser_of
from tests.core import tiny_pipelines as small

pytestmark = pytest.mark.filterwarnings("ignore")  # of schedulers and half precision, not of ours

STEPS = 12  # of the calibration
FAMILIES = ("sd", "sd3", "flux", "z-image", "wan")
OF_IMAGES = {"sd": "StableDiffusionImg2ImgPipeline", "sd3": "StableDiffusion3Img2ImgPipeline"}
# Sigmas that a scheduler can be asked for; LMS, beta sigmas and DPM++ SDE want further packages.
CURVES = ("use_karras_sigmas", "use_exponential_sigmas")
DIFFUSION: dict[str, tuple[str, ...]] = {
    "DDIMScheduler": (), "DDPMScheduler": (), "PNDMScheduler": (), "LCMScheduler": (),
    "TCDScheduler": (), "EulerAncestralDiscreteScheduler": (),
    "EulerDiscreteScheduler": CURVES, "HeunDiscreteScheduler": CURVES,
    "DPMSolverMultistepScheduler": (*CURVES, "use_lu_lambdas"),
    "DPMSolverSinglestepScheduler": CURVES, "KDPM2DiscreteScheduler": CURVES,
    "KDPM2AncestralDiscreteScheduler": CURVES, "DEISMultistepScheduler": CURVES,
    "UniPCMultistepScheduler": CURVES,
}  # fmt: skip
FLOWS = {
    "FlowMatchEulerDiscreteScheduler": CURVES, "FlowMatchHeunDiscreteScheduler": (),
    "FlowMatchLCMScheduler": CURVES,
}  # fmt: skip
BY_FLOW = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # told that it is a flow
OWN_SIGMAS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")  # of FLUX and Z-Image


@dataclass(frozen=True)
class Setting:
    """Of one call of a pipeline."""

    family: str
    scheduler: str
    curve: str
    steps: int
    guidance: float
    strength: float | None  # of an image to start from
    batch: int
    dtype: torch.dtype
    execution: str


def drawn(seed: int) -> Setting:
    """A setting by its number."""
    draw = random.Random(seed)
    family = draw.choice(FAMILIES)
    names = DIFFUSION if family == "sd" else FLOWS | dict.fromkeys(BY_FLOW, ())
    if family in ("flux", "z-image"):
        names = {name: FLOWS[name] for name in OWN_SIGMAS}
    scheduler = draw.choice(list(names))
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
    strength = draw.choice((None, 0.3, 0.6, 0.9)) if family in OF_IMAGES else None
    if family != "sd" and scheduler in BY_FLOW:
        strength = None  # they cannot add noise to an image
    least = 4 if strength else 1  # of less nothing is left of an image's run
    return Setting(
        family, scheduler, draw.choice(("", "", *names[scheduler])), draw.randint(least, 30),
        draw.choice((1.0, 4.0)), strength, draw.randint(1, 3), draw.choice(dtypes),
        draw.choice(("auto", "int8", "float")),
    )  # fmt: skip


@dataclass
class Bench:
    """Tiny pipelines with one artifact a family, made once."""

    artifacts: dict[str, tn.Artifact] = field(default_factory=dict)

    def pipeline(self, family: str) -> tuple[Any, dict[str, Any]]:
        """A new one, and its call."""
        pipe, prompts, call = small.asked(family)
        pipe.set_progress_bar_config(disable=True)
        if prompts:
            call["prompt"] = list(prompts)
        return pipe, call

    def artifact(self, family: str) -> tn.Artifact:
        """Quantized, and half of the later steps reused."""
        if family not in self.artifacts:
            pipe, call = self.pipeline(family)
            given = dict(call)
            prompts = given.pop("prompt", None)
            seen = tn.record(pipe, prompts, steps=STEPS, guidance=2.0, call=given, runs=1, batch=1)
            made = tn.quantize(pipe, tn.schemes.W8A8, seen, temporal="table")
            self.artifacts[family] = made | self.schedule(made, pipe, LateInterval(3, 2))
        return self.artifacts[family]

    def schedule(self, made: tn.Artifact, pipe: Any, policy: Any) -> tn.Artifact:
        """An artifact of a cache schedule alone."""
        found = tn.Artifact.new(pipe, made.header["schedule"])
        times = tuple(made.header["schedule"]["timesteps"])
        names = tuple(b.name for b in tn.describe(denoiser_of(pipe)).branches)
        found.header["route"] = {"timesteps": list(times), "branches": list(names)}
        found.tensors["route/table"] = policy(times, names).table
        return found


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def prepared(bench: Bench, how: Setting) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a setting and its call."""
    import diffusers

    pipe, call = bench.pipeline(how.family)
    if how.strength is not None:
        kind = getattr(diffusers, OF_IMAGES[how.family])
        options = {"requires_safety_checker": False} if how.family == "sd" else {}
        pipe = kind(**pipe.components, **options)
        pipe.set_progress_bar_config(disable=True)
        image = small.picture()
        call |= {"image": [image] * how.batch, "strength": how.strength}
    options = {how.curve: True} if how.curve else {}
    if how.family != "sd" and how.scheduler in BY_FLOW:
        options |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if how.scheduler == "PNDMScheduler":  # as checkpoints have it
        options["skip_prk_steps"] = True
    pipe.scheduler = getattr(diffusers, how.scheduler).from_config(pipe.scheduler.config, **options)
    for name in ("prompt", "prompt_embeds", "negative_prompt_embeds"):
        if name in call:
            call[name] = call[name][: how.batch]
    call |= {"num_inference_steps": how.steps, "guidance_scale": how.guidance}
    return pipe.to(how.dtype), call | {"output_type": "latent"}


def latents(pipe: Any, call: dict[str, Any]) -> Tensor:
    """What one call returns; the same noise each time."""
    torch.manual_seed(0)  # of schedulers that ask for no generator
    given = {k: list(v) if isinstance(v, list) else v for k, v in call.items()}  # it is written to
    given |= {k: v.to(pipe.dtype) for k, v in call.items() if k.endswith("embeds")}
    found = pipe(**given, generator=torch.Generator().manual_seed(1))
    return found.frames if hasattr(found, "frames") else found.images


def share_of(counts: dict[str, list[int]]) -> float:
    """Reused calls among all."""
    computed, reused = (sum(column) for column in zip(*counts.values(), strict=True))
    return reused / max(1, computed + reused)


def check(bench: Bench, how: Setting) -> dict[str, Any]:
    """Everything that holds at any setting; returns what was seen."""
    pipe, call = prepared(bench, how)
    made = bench.artifact(how.family)
    plain = latents(pipe, call)
    steps = visited(how)
    with tn.attach(pipe, made, execution=how.execution) as attached:
        latents(pipe, call)
        found = latents(pipe, call)
        share, asked = share_of(attached.counts()), schedule_of(made).reuse_ratio
    assert torch.isfinite(found).all() == torch.isfinite(plain).all()
    assert torch.equal(latents(pipe, call), plain), "off is not off"
    if steps < SHORTEST:
        assert share == 0
    else:
        assert abs(share - asked) <= 0.05, (share, asked)
    whole = bench.schedule(made, pipe, CacheSchedule.full)
    with tn.attach(pipe, whole, execution="float"):
        assert torch.equal(latents(pipe, call), plain), "on, and all is computed"
    return {"steps": steps, "share": share, "asked": asked}


def visited(how: Setting) -> int:
    """How many steps of its scheduler a run takes."""
    if how.strength is None:
        return how.steps
    left = how.steps * how.strength
    return int(left) if how.family == "sd" else how.steps - int(how.steps - left)


@pytest.mark.parametrize("seed", range(16))
def test_a_random_setting(bench: Bench, seed: int) -> None:
    check(bench, drawn(seed))


CHOSEN = {
    "few steps of two timesteps each": ("sd", "KDPM2DiscreteScheduler", 8, None),
    "many": ("sd", "KDPM2DiscreteScheduler", 9, None),
    "few are left": ("sd", "KDPM2DiscreteScheduler", 20, 0.4),
    "more noise at every step than is left": ("flux", "FlowMatchLCMScheduler", 9, None),
    "the same, of a diffusion model": ("sd", "LCMScheduler", 20, None),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_chosen_setting(bench: Bench, name: str) -> None:
    """What random settings found wrong: a second timestep is no step, new noise no new run."""
    family, scheduler, steps, strength = CHOSEN[name]
    how = Setting(family, scheduler, "", steps, 1.0, strength, 1, torch.float32, "float")
    check(bench, how)
