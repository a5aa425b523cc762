"""From what a user chose to what is put in: a cache schedule at a budget, or a fixed rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tenuto.artifact import Artifact, kernel_of, measured, policy_of, schedule_of
from tenuto.caching import CacheSchedule, Facts, at_share, made, unmeasured
from tenuto.errors import ArtifactError
from tenuto.numerics import Scheme, named

from .adapter import GRID, Chosen
from .cache import Limits, Plan
from .choices import AUTO, FASTEST, FROM_ARTIFACT, OFF, RULES, Choices
from .run import Run


def chosen_of(
    choices: Choices, artifact: Artifact | None, own: str, half: bool = False, **options: Any
) -> Chosen:
    """What `choices` put in. artifact: None is a built-in one, whose route is a rule.

    own: the precision that "From artifact" stands for. options: `execution` and `lora`.
    """
    precision = own if choices.precision == FROM_ARTIFACT else choices.precision
    from_file = artifact is not None and precision == own
    scheme: Scheme | None = None
    if precision != OFF and not from_file:
        scheme = named(precision.lower())
    limits = Limits(choices.start, choices.stop, choices.last, choices.longest, half)
    return Chosen(
        artifact=artifact, scheme=scheme, weights=precision != OFF, limits=limits,
        **cache_of(choices, artifact), **options,
    )  # fmt: skip


def cache_of(choices: Choices, artifact: Artifact | None) -> dict[str, Any]:
    """The fields of `Chosen` that say what is reused, or that whole calls are skipped instead."""
    if choices.speedup > 1:
        return {"route": False, "speedup": choices.speedup}
    if choices.cache == OFF or choices.speed <= 1:
        return {"route": False}
    if choices.cache in RULES:
        settings = {"period": max(1, round(choices.speed))}
        return {"policy": made(RULES[choices.cache], settings), "by_step": True}
    return (_automatic if choices.cache == AUTO else _branches)(choices, artifact)


def _automatic(choices: Choices, artifact: Artifact | None) -> dict[str, Any]:
    """Whole calls are skipped, and branches reused in runs that allow no skipping.

    A file with a schedule and no forecast keeps to what was measured on its model: the schedule.
    """
    scheduled = artifact is None or schedule_of(artifact) is not None
    rest = _branches(choices, artifact) if scheduled else {"route": False}
    if artifact is not None and scheduled and kernel_of(artifact) is None:
        return rest
    return rest | {"speedup": min(choices.speed, FASTEST), "fallback": True}


def _branches(choices: Choices, artifact: Artifact | None) -> dict[str, Any]:
    """What Router reuses: by rule without an artifact, else by its schedule at a budget."""
    reuse, first = 1 - 1 / choices.speed, math.ceil(choices.start * len(GRID))
    if artifact is None:
        return {"policy": partial(unmeasured, reuse, first)}
    return {"limit": at_budget(artifact, reuse)}


def at_budget(artifact: Artifact, reuse: float) -> Callable[[CacheSchedule], CacheSchedule]:
    """Turns the artifact's schedule, in any names, into one that reuses `reuse` of the cells.

    What calibration measured decides. A schedule that nothing is known of stays as it is.
    """
    facts = measured(artifact)
    if facts is None:
        raise ArtifactError(
            "The artifact has no cache schedule: make one with `tenuto train-router`, or choose "
            "Uniform."
        )
    known = facts

    def changed(route: CacheSchedule) -> CacheSchedule:
        here = Facts(route.timesteps, route.branches, known.costs, known.logits)
        return at_share(route, reuse, here, policy_of(artifact))

    return changed


def share(choices: Choices, artifact: Artifact | None) -> float:
    """The share of branch calls that a run of 20 even steps computes: a forecast."""
    what = cache_of(choices, artifact)
    limits = Limits(choices.start, choices.stop, choices.last, choices.longest)
    policy, schedule = what.get("policy"), schedule_of(artifact) if artifact else None
    if what.get("by_step"):
        return computed(Plan(("block",), policy=policy, limits=limits))
    if policy is not None:
        schedule = policy(GRID, ("block",))
    if "limit" in what and schedule is not None:
        schedule = what["limit"](schedule)
    if schedule is None or what.get("route") is False:
        return 1.0
    return computed(Plan(schedule.branches, schedule, limits=limits))


def computed(plan: Plan) -> float:
    """The share of branch calls that a plan computes in a run of 20 even steps."""
    run, count = Run(), 0
    run.steps = steps = len(GRID)
    ages = [0] * len(plan.branches)
    times: Sequence[float] = plan.schedule.timesteps if plan.schedule is not None else ()
    for step in range(steps):
        run.step = step
        row = min(len(times) - 1, int(step * len(times) / steps)) if times else 0
        for branch, age in enumerate(ages):
            free = plan.limits.longest == 0 or age < plan.limits.longest
            reused = step > 0 and free and plan.reuses(run, row, branch)
            ages[branch] = age + 1 if reused else 0
            count += not reused
    return count / max(1, len(ages) * steps)
