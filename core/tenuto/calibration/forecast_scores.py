"""What a forecast is worth, measured: held-out images with some calls skipped, beside full runs."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..artifact import Artifact, kernel_of
from ..caching import SHORTEST, Forecast, untold
from ..errors import TenutoError
from ..model import all_frozen, denoiser_of, device_and_dtype, parts_of
from ..progress import Progress
from ..resources import prompts as shipped_prompts
from ..runtime import Patches
from ..runtime.attachment import install
from ..sampling import OutputKernel, Sample, Trajectory, sampler, wanted_prompts
from ..sampling.record import Sampler
from .check.estimates import is_cheap
from .costs import COUNT, SPEEDUPS, images_of

SEED = 5_000  # of the first of the images
MOST = 100.0  # dB, which equal images are given


def measurable(model: Any, trajectory: Trajectory, wanted: bool | None = None) -> bool:
    """Whether the forecast of a recording can be measured, and is to be.

    wanted: None only where that takes few products, whatever else the machine does.
    """
    kernel = trajectory.kernel
    if wanted is False or kernel is None or len(kernel.timesteps) < SHORTEST:
        return False
    if held_out(model, trajectory) is None or len(parts_of(model)) > 1:
        return False
    if any(parameter.is_meta for parameter in denoiser_of(model).parameters()):
        return False
    device, _ = device_and_dtype(denoiser_of(model))
    images = images_of(len(trajectory.timesteps))
    return wanted is True or is_cheap(model, images, trajectory.call, device)


def with_scores(
    model: Any, artifact: Artifact, trajectory: Trajectory, on_progress: Progress | None = None
) -> Artifact:
    """`artifact` with the header's `forecast.measured`, of a recording that is `measurable`.

    The model itself, in full precision, generates `COUNT` images of prompts that were not recorded,
    in full and at every one of `SPEEDUPS`. Nothing is added where it makes no images.
    """
    sample, kernel = held_out(model, trajectory), kernel_of(artifact)
    if sample is None or kernel is None:
        return artifact
    try:
        with untold():
            found = _scores(model, kernel, sample, trajectory.batch, on_progress)
    except TenutoError:
        return artifact
    about = {"images": COUNT, "seed": SEED, "scores": found}
    artifact.header["forecast"] = artifact.header["forecast"] | {"measured": about}
    return artifact


def held_out(model: Any, trajectory: Trajectory) -> Sample | None:
    """A sampler of prompts that were not recorded, else of other noise; None without a pipeline."""
    made = trajectory.sample
    if not isinstance(made, Sampler):
        return None
    given = made.asked.given
    known = set(trajectory.prompts)
    ours = known & set(shipped_prompts("default"))
    others = shipped_prompts("evaluation") if ours else shipped_prompts("general")[::-1]
    lines = tuple(line for line in others if line not in known)[:COUNT]
    lines = wanted_prompts(model, lines, given) if trajectory.prompts else ()
    return sampler(model, lines, trajectory.steps, trajectory.guidance, call=given)


def _scores(
    model: Any, kernel: OutputKernel, sample: Sample, batch: int, on_progress: Progress | None
) -> list[dict[str, Any]]:
    steps, denoiser = len(kernel.timesteps), denoiser_of(model)
    plans = {speedup: Forecast(kernel, speedup).plan(kernel.timesteps) for speedup in SPEEDUPS}
    plans = {speedup: plan for speedup, plan in plans.items() if plan.calls < steps}
    whole, done = steps + sum(plan.calls for plan in plans.values()), 0

    def images(size: int, note: str) -> Tensor:
        nonlocal done
        if on_progress is not None:
            on_progress(done, whole, note)
        done += size
        starts = range(SEED, SEED + COUNT, max(1, batch))
        found = [sample(denoiser, s, min(batch, SEED + COUNT - s)).cpu() for s in starts]
        return torch.cat(found).clamp(-1, 1).double()

    rows = []
    with all_frozen([denoiser]), torch.no_grad():
        full = images(steps, "full run")
        for speedup, plan in plans.items():
            with install(model, Patches(kernel=kernel, speedup=speedup)):
                found = images(plan.calls, f"{speedup:g} x")
            errors = (found - full).square().flatten(1).mean(1).tolist()
            db = [min(MOST, 10 * math.log10(4 / max(error, 1e-30))) for error in errors]
            rows.append({
                "speedup": speedup, "skipped": steps - plan.calls, "psnr_db": round(median(db), 2),
                "predicted": float(f"{plan.error:.6g}"),
            })  # fmt: skip
    if on_progress is not None:
        on_progress(whole, whole, "measured")
    return rows
