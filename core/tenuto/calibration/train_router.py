"""`train_router`: find, for one model, which branch to reuse at which step, and measure it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..artifact import Artifact, kernel_of, set_default
from ..caching import SHORTEST, table_policy
from ..errors import SchemeError, TenutoError
from ..model import (
    Describe,
    describing,
    parts_of,
    refuse_cache,
)
from ..progress import Progress, Shown, parts, shown
from ..runtime import check_free, quantized
from ..sampling import Sample, Trajectory
from ..sampling.loading import Defaults, defaults
from .by_denoiser import joined, recordings
from .given import check_place, trajectory_of
from .route_job import DEFAULT_REUSE, TRAINED, RouteJob
from .router.effort import PRESETS, calls_of_search

TABLES = 20  # candidates, about


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
    on_progress: Shown = True,
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
    the router's own table are kept. describe, work, on_progress: as in `quantize`. Of several
    denoisers each has a route for its own steps; one that is called at a single step has none.
    """
    describing(model, describe)
    made = None if artifact is None else Artifact.of(artifact)
    check_route(model, made, preset, reuse, speedup, policy, whole, sample, work)
    with shown(on_progress, "Training the router") as told:
        notes = parts(told, _sizes(model, trajectory, made, preset, reuse))
        known, batch = made and made.header["schedule"], PRESETS[preset].batch
        given = model, trajectory, batch, batch, seed, notes["recorded"], known
        trajectory = trajectory_of(*given)
        if sample is not None:
            trajectory = dataclasses.replace(trajectory, sample=sample, latent=None)
        own, runs = {} if made is None else made.by_denoiser(model), recordings(model, trajectory)
        jobs: dict[str, RouteJob] = {}
        for name, part in runs.items():
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
        found = _searched(model, runs, jobs, work, notes["search"])
    return _forecast_by_default(found, reuse, speedup) if whole else found


def _searched(
    model: Any,
    runs: Mapping[str, Trajectory],
    jobs: Mapping[str, RouteJob],
    work: str | Path | None,
    on_progress: Progress,
) -> Artifact:
    """What the searches find, of every denoiser."""
    idle = {name: partial(_routeless, model, name, part) for name, part in runs.items()}
    makes = idle | {name: job.run for name, job in jobs.items()}
    sizes = {name: sum(jobs[name].sizes().values()) if name in jobs else 0 for name in makes}
    return joined(makes, sizes, work, on_progress)


def _sizes(
    model: Any,
    given: Trajectory | Sequence[str],
    artifact: Artifact | None,
    preset: str,
    reuse: float | None,
) -> dict[str, int]:
    """What recording and the search take, in calls of one batch, as far as can be said before."""
    if isinstance(given, Trajectory) or isinstance(model, nn.Module):
        return {"recorded": 0, "search": 1_000_000}
    usual = defaults(model) if artifact is None else Defaults.read(artifact.header["schedule"])
    calls = calls_of_search(PRESETS[preset], usual.steps, reuse or DEFAULT_REUSE, TABLES)
    return {"recorded": usual.steps, "search": round(sum(calls.values()))}


def check_route(
    model: Any,
    artifact: Artifact | None,
    preset: str,
    reuse: float | None,
    speedup: float | None,
    policy: str | None,
    whole: bool,
    sample: Sample | None,
    work: str | Path | None,
) -> None:
    """TenutoError where the search would end in one, whatever is recorded for it."""
    check_place(work)
    if sample is not None and len(parts_of(model)) > 1:
        raise TenutoError("A pipeline of several denoisers runs itself: leave `sample` out.")
    if preset not in PRESETS:
        raise SchemeError(f"Unknown preset {preset!r}: choose one of {', '.join(PRESETS)}.")
    for denoiser in parts_of(model).values():
        check_free(denoiser)
        refuse_cache(denoiser, "a search for what can be reused")
    if artifact is not None:
        artifact.check(model)
    if reuse is not None and speedup is not None:
        raise TenutoError("Ask for a reuse ratio or for a speedup, not for both.")
    if reuse is not None and not 0 < reuse < 1:
        raise TenutoError(
            f"A run cannot reuse {reuse:.0%} of its branches: ask for more than 0 and less than 1."
        )
    if speedup is not None and not speedup > 1:
        raise TenutoError(f"A speedup is a number above 1, not {speedup:g}.")
    if policy is not None:
        table_policy(policy)
    if whole and policy in TRAINED:
        raise TenutoError("Of whole calls no router is trained: choose another policy.")


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
