"""`train_router`: find, for one model, which branch to reuse at which step, and measure it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..artifact import Artifact, kernel_of, set_default
from ..caching import SHORTEST
from ..errors import TenutoError
from ..model import (
    Describe,
    describing,
    parts_of,
)
from ..progress import Progress
from ..runtime import quantized
from ..sampling import Sample, Trajectory
from .by_denoiser import joined, recordings
from .given import trajectory_of
from .route_job import DEFAULT_REUSE, RouteJob
from .router.effort import PRESETS


def train_router(
    model: Any,
    trajectory: Trajectory | Sequence[str],
    *,
    reuse: float | None = None,
    speedup: float | None = None,
    artifact: Artifact | str | Path | None = None,
    preset: str = "quick",
    iterations: int | None = None,
    seed: int = 0,
    sample: Sample | None = None,
    whole: bool = False,
    policy: str | None = None,
    weighting: str | None = None,
    describe: Describe | None = None,
    work: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Artifact:
    """Train a router for each denoiser of `model`; returns an artifact with the section "route".

    trajectory: a recording, or prompts for a pipeline, recorded once as `artifact` was made.
    reuse: the share of the branches' work to reuse. speedup: how many times fewer multiply-adds
    a run is to do instead; the share of branch work follows (`reuse_for`). Neither is 30 % reuse.
    policy: this one alone, by its name among `caching.policies()`; without one the best is taken.
    weighting: the rule of a router's step weights: "gain", "paper" or "code" (`HarmoniCa`).
    whole: reuse whole calls of the denoiser: the steps are what the policies make of measured
    costs, no router is trained, and `attach` takes a forecast of that budget, if there is one.
    artifact: what `quantize` made of this model; the quantized model is teacher and student then.
    Router and cache policies are measured on held-out seeds; the best becomes the route, scores and
    the router's own table are kept. describe, work: as in `quantize`. Of several denoisers each has
    a route for its own steps; one that is called at a single step has none.
    """
    describing(model, describe)
    made = None if artifact is None else Artifact.of(artifact)
    known = None if made is None else made.header["schedule"]
    if not isinstance(trajectory, Trajectory):
        batch = PRESETS[preset].batch if preset in PRESETS else 1
        trajectory = trajectory_of(model, trajectory, batch, batch, seed, on_progress, known)
    if sample is not None:
        if len(parts_of(model)) > 1:
            raise TenutoError("A pipeline of several denoisers runs itself: leave `sample` out.")
        trajectory = dataclasses.replace(trajectory, sample=sample, latent=None)
    own, parts = {} if made is None else made.by_denoiser(model), recordings(model, trajectory)
    jobs: dict[str, RouteJob] = {}
    for name, part in parts.items():
        if len(part.timesteps) > 1 or len(trajectory.timesteps) == 1:
            jobs[name] = RouteJob(model, part, own.get(name), preset, seed, name)
            jobs[name].plan_for(iterations)
            if whole:
                jobs[name].take_whole()
            jobs[name].choose(policy, weighting)
            jobs[name].budget(reuse, speedup)
    if not jobs:
        raise TenutoError("With one step of each denoiser there is nothing to reuse.")
    _quantize(model, jobs, trajectory, own)
    idle = {name: partial(_routeless, model, name, part) for name, part in parts.items()}
    makes = idle | {name: job.run for name, job in jobs.items()}
    sizes = {name: sum(jobs[name].sizes().values()) if name in jobs else 0 for name in makes}
    made = joined(makes, sizes, work, on_progress)
    return _forecast_by_default(made, reuse, speedup) if whole else made


def _forecast_by_default(
    artifact: Artifact, reuse: float | None, speedup: float | None
) -> Artifact:
    """`artifact` of whole calls, which its forecast skips at this budget where it has one."""
    kernel = kernel_of(artifact)
    if kernel is None or len(kernel.timesteps) < SHORTEST:
        return artifact
    asked = DEFAULT_REUSE if reuse is None else reuse
    return set_default(artifact, 1 / (1 - asked) if speedup is None else speedup)


def _quantize(
    model: Any, jobs: Mapping[str, RouteJob], trajectory: Trajectory, own: Mapping[str, Artifact]
) -> None:
    """Let the searches run on quantized denoisers, of which `own` are the artifacts, if any."""
    how: Any = {"route": False, "execution": "int8", "graphs": False}
    low = {
        name: quantized(parts_of(model)[name], part, **how).denoiser for name, part in own.items()
    }
    if low:
        for name, part in recordings(model, trajectory, low).items():
            if name in jobs:
                jobs[name].use(low.get(name), part)


def _routeless(
    model: Any, name: str, trajectory: Trajectory, work: Path | None, on_progress: Progress | None
) -> Artifact:
    """Of a denoiser with a single step."""
    return Artifact.new(model, trajectory.schedule(), part=name)
