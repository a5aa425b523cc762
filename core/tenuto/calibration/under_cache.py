"""Calls as they are made when others are skipped: what a quantized model will really see.

Where a forecast or a cache schedule skips work, a run computes some steps alone, at samples that
earlier errors have moved, and what it computes counts more than once. Calibration on such a run
gives ranges, GPTQ and AdaRound those inputs, and the weight that each step has for the result:

    final sample / alpha is off by sum_s c_s * error_s,    c_s = gain_s + sum_t gain_t * w[t, s],

where t are the skipped steps that are forecast from the computed step s with weight w[t, s], or
that reuse what was computed in it (w = 1), and gains are those of `OutputKernel`. A step counts c_s
squared, as if the errors of two steps had nothing in common.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..caching import (
    CacheSchedule,
    Forecast,
    ForecastCalls,
    Speedup,
    apply_schedule_,
    check_speedup,
    untold,
)
from ..errors import TenutoError
from ..model import (
    Signature,
    all_frozen,
    denoiser_of,
    map_tensors,
    override_,
    parts_of,
    tensors_in,
)
from ..numerics import Recipe, Scheme
from ..progress import Progress
from ..runtime import attach
from ..sampling import Call, Clock, Follow, OutputKernel, Trajectory, processes
from ..sampling.trajectory import nearest
from .given import needs_every_prompt
from .presets import Preset

UnderCache: TypeAlias = "Speedup | CacheSchedule"
Kept: TypeAlias = "tuple[float, dict[str, Any]]"  # the timestep and the arguments of a call


def under_cache(
    model: Any,
    trajectory: Trajectory,
    skipped: UnderCache,
    *,
    artifact: Artifact | None = None,
    weighted: bool = True,
    on_progress: Progress | None = None,
) -> Trajectory:
    """The runs of `trajectory` again, with work skipped: the calls that are computed, and no other.

    model: the pipeline or denoiser that was recorded. skipped: the speedup of a forecast by the
    recorded kernel, or a schedule of branches, of which a step that computes none is left out.
    artifact: what the model is quantized with in these runs; None: it computes in full precision.
    weighted: every call has the weight that its step has for the result, 1 in the mean; else 1.
    TenutoError where there are several denoisers, no kernel for a forecast, or no way to run again.
    """
    if len(parts_of(model)) > 1:
        raise TenutoError("A model of several denoisers is calibrated on full runs alone.")
    if not isinstance(skipped, CacheSchedule) and trajectory.kernel is None:
        raise TenutoError("The recording has no forecast, under which it could be run again.")
    told = processes().told(on_progress)
    counts = counts_of(trajectory, skipped)
    computed = [row for row, count in enumerate(counts) if count is not None]
    starts = starts_of(trajectory)

    def run(place: int) -> list[Kept]:
        if told is not None:
            told(place, len(starts), "recording with calls skipped")
        return _run(model, trajectory, skipped, artifact, *starts[place])

    calls = list[Call]()
    for number, kept in enumerate(processes().each(range(len(starts)), run)):
        rows = [nearest(trajectory.timesteps, timestep) for timestep, _ in kept]
        calls += [
            Call(number, row, *one, weight=(counts[row] or 0.0) if weighted else 1.0)
            for row, one in zip(rows, kept, strict=True)
            if row in computed
        ]
    if not calls:
        raise TenutoError("The denoiser was not called when the recording was run again.")
    about = {"computed": computed, "weighted": weighted, "quantized": artifact is not None}
    if not isinstance(skipped, CacheSchedule):
        about["speedup"] = skipped
    return replace(trajectory, calls=calls, under=about)


def _run(
    model: Any,
    trajectory: Trajectory,
    skipped: UnderCache,
    artifact: Artifact | None,
    seed: int,
    batch: int,
) -> list[Kept]:
    """The calls of one run that are computed."""
    denoiser, sample, kept = denoiser_of(model), trajectory.rollout(), list[Kept]()
    facts, clock = Signature(denoiser), Clock(trajectory.timesteps)
    with ExitStack() as stack, all_frozen([denoiser]), torch.no_grad(), untold():
        how: Any = {"route": False, "speedup": 1, "execution": "int8", "graphs": False}
        stack.enter_context(nullcontext() if artifact is None else attach(model, artifact, **how))
        patches = [Follow(model, clock), override_(denoiser, _noting(facts, kept))]
        stack.callback(lambda: [patch.remove() for patch in reversed(patches)])
        if isinstance(skipped, CacheSchedule):
            patches += apply_schedule_(denoiser, skipped, clock)
        else:
            forecast = Forecast(_kernel(trajectory), skipped)
            patches.append(override_(denoiser, ForecastCalls(clock, forecast, denoiser)))
        sample(denoiser, seed, batch)
    return kept


def check_under(
    under: UnderCache | Trajectory | None,
    scheme: Scheme | Recipe,
    effort: Preset,
    rounding: str | None = None,
) -> None:
    """TenutoError where no call that is recorded under a cache would be looked at; None is none."""
    if under is None:
        return
    if not isinstance(under, CacheSchedule | Trajectory):
        check_speedup(under)
    if not needs_every_prompt(scheme, effort, rounding):
        raise TenutoError(
            "Weights that round to nearest, with ranges found on the fly, see no recorded call: "
            "there is nothing to calibrate under a cache."
        )


def mark_of(trajectory: Trajectory) -> list[Any]:
    """What tells two such recordings apart: how they were made, and a hash of samples, weights."""
    found = hashlib.sha256()
    for call in trajectory.calls:
        found.update(f"{call.row} {call.weight!r}".encode())
        first = next(tensors_in(call.inputs), torch.zeros(1))
        found.update(first.double().contiguous().numpy().tobytes())
    return [trajectory.under, found.hexdigest()[:16]]


def _noting(facts: Signature, kept: list[Kept]) -> Any:
    """A forward that keeps the arguments of each call which comes to it."""

    def forward(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = facts.inputs(args, kwargs)
        copied = map_tensors(lambda t: t.detach().to("cpu", copy=True), inputs)
        kept.append((facts.step(inputs), copied))
        return original(*args, **kwargs)

    return forward


def _kernel(trajectory: Trajectory) -> OutputKernel:
    assert trajectory.kernel is not None
    return trajectory.kernel


def starts_of(trajectory: Trajectory) -> list[tuple[int, int]]:
    """(seed, images) of each run."""
    batch, runs, count = trajectory.batch, trajectory.runs, len(trajectory.prompts)
    left = count if (runs - 1) * batch < count <= runs * batch else runs * batch
    return [(trajectory.seed + i * batch, min(batch, left - i * batch)) for i in range(runs)]


def counts_of(trajectory: Trajectory, skipped: UnderCache) -> list[float | None]:
    """What each step counts for the result, 1 in the mean over those computed; None: it is not.

    The square of what its error does to the sample, by itself and in all that is forecast of it.
    """
    times, kernel = trajectory.timesteps, trajectory.kernel
    known = kernel if kernel is not None and kernel.timesteps == times else None
    gains = torch.ones(len(times), dtype=torch.float64) if known is None else known.gains()
    if isinstance(skipped, CacheSchedule):
        computed = skipped.at(times).table.any(1).tolist()
        taps = [(max(r for r in range(t + 1) if computed[r]),) for t in range(len(times))]
        weights = [(1.0,)] * len(times)
    else:
        with untold():
            plan = Forecast(_kernel(trajectory), skipped).plan(times)
        computed, taps, weights = list(plan.computed), list(plan.taps), list(plan.weights)
    total = gains.clone()
    for row, computes in enumerate(computed):
        for tap, weight in zip(taps[row], weights[row], strict=True) if not computes else ():
            total[tap] += gains[row] * weight
    counts: Tensor = total.square()[computed]
    mean = float(counts.mean())
    scaled = iter((counts / mean if mean > 0 else torch.ones_like(counts)).tolist())
    return [next(scaled) if computes else None for computes in computed]
