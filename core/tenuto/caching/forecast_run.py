"""A forecast in one run of a host that says its timesteps before the first call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..sampling import CallInProgress, Clock, goes_as, visited_once
from .forecast import ForecastCalls, why_full
from .forecast_budget import predicted
from .forecast_plan import Forecast

BACKWARDS = "No call is skipped: this run does not go from much noise to little, step by step."
ELSEWHERE = "No call was skipped: this sampler went to other steps than it had said."


def forecast_run(
    forecast: Forecast,
    times: Sequence[float],
    denoiser: nn.Module,
    stochastic: bool = False,
    guidance: float | None = None,
) -> tuple[ForecastCalls, str]:
    """(calls, why): the forward of `denoiser` for this run alone, and why it skips nothing.

    times: of the run, in executed order, as the denoiser gets them; equal ones in a row are one
    step. The clock of the calls stands at them: whoever runs the denoiser moves it. stochastic:
    whether the sampler adds noise of its own. guidance: of the run, None where it is not known.
    why: one sentence, or "" where something is skipped.
    """
    steps = visited_once(times)
    straight = goes_as(steps, forecast.kernel.timesteps)
    clock = Clock(steps)
    clock.stochastic = stochastic or not straight
    told = CallInProgress(None if guidance is None else max(1.0, guidance), clock.stochastic)
    calls = ForecastCalls(clock, forecast, denoiser, lambda _: told)
    plan = forecast.plan(steps, clock.stochastic, guidance=told.guidance)
    if not all(plan.computed):
        return calls, ""
    if not straight and not stochastic:
        return calls, BACKWARDS
    return calls, why_full(forecast, len(steps), stochastic)


def why_none(calls: ForecastCalls) -> str:
    """Why a run skipped nothing though its plan did; "" where it is over as planned."""
    if calls.patch:
        return f"No call was skipped: a hook in {calls.patch} reads along, and would miss some."
    return "" if calls.counts[1] or all(calls.plan.computed) else ELSEWHERE


def said_of(calls: ForecastCalls) -> str:
    """What a run that skipped calls is likely to have cost, in one sentence; else ""."""
    made = calls.forecast
    if not calls.counts[1] or not isinstance(made, Forecast):
        return ""
    return predicted(made.db(calls.plan), bool(made.origin))
