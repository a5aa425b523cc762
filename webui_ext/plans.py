"""From what a user chose to a `Plan`: an artifact's route at a budget, a rule without one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tenuto.artifact import Artifact, schedule_of
from tenuto.caching import CacheSchedule, StepProgramme, late_interval_for
from tenuto.calibration.router.logits import Router
from tenuto.errors import ArtifactError

from .cache import Plan
from .choices import OFF, ROUTER, Choices

GRID = 20  # steps of a rule that knows no timesteps of its own
NEAR = 0.03  # a budget this near to the route's own is the route's own


def plan_of(
    choices: Choices, artifact: Artifact | None, branches: Sequence[str], half: bool = False
) -> Plan | None:
    """The plan for a model's `branches`; None where nothing is ever reused.

    artifact: one in the model's own names; None is a built-in one, whose route is a rule.
    """
    if choices.cache == OFF or choices.speed <= 1 or not branches:
        return None
    schedule = None
    if choices.cache == ROUTER:
        schedule = rule(choices, branches) if artifact is None else at_budget(artifact, choices)
        schedule = spread(schedule, branches)
        if bool(schedule.table.all()):
            return None
    return Plan(
        schedule, max(1, round(choices.speed)), choices.start, choices.stop, choices.last,
        choices.longest, half,
    )  # fmt: skip


def at_budget(artifact: Artifact, choices: Choices) -> CacheSchedule:
    """The artifact's route, where it computes about 1 / speed of the cells; else one like it.

    What calibration measured decides then: the scores of the router where that was the best, the
    costs of the steps otherwise. A route with neither stays as it is.
    """
    route = schedule_of(artifact)
    if route is None:
        raise ArtifactError(
            "The artifact has no route: make one with `tenuto train-router`, or choose Uniform."
        )
    reuse = 1 - 1 / choices.speed
    if abs(route.reuse_ratio - reuse) <= NEAR:
        return route
    logits, costs = (artifact.tensors.get(f"route/{name}") for name in ("logits", "costs"))
    policy = str(artifact.header["route"].get("policy", ""))
    if logits is not None and policy.startswith("router"):
        ones = torch.ones(len(route.branches))
        return Router(logits, route.timesteps, route.branches, ones, 0.0).cut(reuse)
    if costs is not None:
        steps = len(route.timesteps)
        share = min(round(reuse * steps), steps - 1) / steps
        return StepProgramme(share, tuple(costs.tolist()), 2.0)(route.timesteps, route.branches)
    return route


def rule(choices: Choices, branches: Sequence[str]) -> CacheSchedule:
    """A late interval: the first steps, then one of every few. Nothing was measured."""
    times = [1000 * (1 - (step + 0.5) / GRID) for step in range(GRID)]
    first = math.ceil(choices.start * GRID)
    found = late_interval_for(1 - 1 / choices.speed, times, branches)
    late = [policy for policy in found if policy.first >= first] or found
    return min(late, key=lambda policy: policy.period)(times, branches)


def spread(schedule: CacheSchedule, branches: Sequence[str]) -> CacheSchedule:
    """The schedule with a column for each of `branches`; those that it does not name compute."""
    table = torch.ones(len(schedule.timesteps), len(branches), dtype=torch.bool)
    for column, name in enumerate(schedule.branches):
        table[:, branches.index(name)] = schedule.table[:, column]
    return CacheSchedule(table, schedule.timesteps, tuple(branches))


def share(plan: Plan | None, branches: int, steps: int = GRID) -> float:
    """The share of branch calls that a run of `steps` even steps computes: a forecast."""
    if plan is None:
        return 1.0
    from .run import Run

    run, computed = Run(), 0
    run.steps = steps
    ages = [0] * branches
    times = plan.schedule.timesteps if plan.schedule is not None else ()
    for run.step in range(steps):
        row = min(len(times) - 1, int(run.step * len(times) / steps)) if times else 0
        for branch in range(branches):
            free = plan.longest == 0 or ages[branch] < plan.longest
            reused = run.step > 0 and free and plan.reuses(run, row, branch)
            ages[branch] = ages[branch] + 1 if reused else 0
            computed += not reused
    return computed / max(1, branches * steps)
