"""Branches reused from evaluation to evaluation, by a plan: what a run reuses and what it counts.

Layers are patched, not the sequences that hold them: reForge walks the layers of a block and never
calls the block.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from tenuto.caching import CachedBranch, CacheSchedule, for_branch
from tenuto.model import Override, override_
from tenuto.runtime import Policy
from tenuto.sampling import Clock

from .run import Run


@dataclass(frozen=True)
class Limits:
    """What the fields of the accordion allow a plan to reuse.

    start, stop: shares of the steps between which anything is reused. last: compute the last step.
    longest: how often in a row a branch is reused; 0: no limit. half: keep fp16.
    """

    start: float = 0.0
    stop: float = 1.0
    last: bool = False
    longest: int = 0
    half: bool = False

    def first(self, steps: int) -> int:
        """The first step that may be reused."""
        return math.ceil(self.start * steps - 1e-9)

    def allow(self, run: Run) -> bool:
        """Whether anything may be reused in the step at which `run` is."""
        past = self.stop < 1 and run.step >= math.ceil(self.stop * run.steps - 1e-9)
        return run.step >= self.first(run.steps) and not past and not (self.last and run.last)


@dataclass(frozen=True, eq=False)
class Plan:
    """When to reuse which of `branches`.

    schedule: a table, read at the nearest timestep where a run has as many steps, else one made of
    it for the run. policy: without one, a rule that is asked for the steps from the first that may
    be reused on.
    """

    branches: tuple[str, ...]
    schedule: CacheSchedule | None = None
    policy: Policy | None = None
    limits: Limits = field(default_factory=Limits)

    def reuses(self, run: Run, row: int, branch: int) -> bool:
        """Whether this branch may be reused in the step at which `run` is."""
        if not self.limits.allow(run):
            return False
        if self.schedule is not None:
            if run.steps != len(self.schedule.timesteps):
                row = run.step
            return not _rows(self.schedule, run.steps)[row][branch]
        first = self.limits.first(run.steps)
        table = _table(self.policy, run.steps - first, self.branches)
        return not table[run.step - first][branch]

    def ever(self, branch: int) -> bool:
        """Whether the branch is reused at any time: others are left alone."""
        return self.schedule is None or not bool(self.schedule.table[:, branch].all())


@lru_cache(maxsize=8)
def _rows(schedule: CacheSchedule, steps: int) -> list[list[bool]]:
    own = steps == len(schedule.timesteps)
    return (schedule if own else schedule.in_steps(steps)).table.tolist()


@lru_cache(maxsize=8)
def _table(policy: Any, steps: int, branches: tuple[str, ...]) -> list[list[bool]]:
    return policy(range(steps, 0, -1), branches).table.tolist()


class Cache:
    """A plan in use. computed, reused: branch calls since then. on: not where calls are skipped."""

    def __init__(self, plan: Plan, run: Run) -> None:
        self.plan, self.run, self.on = plan, run, True
        self.clock = Clock(plan.schedule.timesteps if plan.schedule is not None else ())
        self.calls = [BranchCall(self, number) for number in range(len(plan.branches))]
        run.clocks.append(self.clock)

    def overrides(self, denoiser: nn.Module) -> list[Override]:
        """One a branch that is ever reused."""
        return [
            override_(denoiser.get_submodule(name), for_branch(call, name, denoiser))
            for name, call in zip(self.plan.branches, self.calls, strict=True)
            if call.keeps
        ]

    @property
    def reused(self) -> int:
        """Branch calls that handed out what was there."""
        return sum(call.counts[1] for call in self.calls)

    @property
    def computed(self) -> int:
        """Branch calls that computed, those of branches that are never reused with them."""
        most = max((sum(call.counts) for call in self.calls), default=0)
        return sum(call.counts[0] if sum(call.counts) else most for call in self.calls)

    def bytes(self) -> int:
        """What is stored now."""
        return sum(call.slot.bytes() for call in self.calls)


class BranchCall(CachedBranch):
    """The forward of one branch: its own, or what it gave in the evaluation before.

    A stream is the number of the denoiser call in its evaluation with the rows of its batch: hosts
    order the halves of guidance as they like. What does not fit is computed.
    """

    def __init__(self, owner: Cache, number: int) -> None:
        plan, half = owner.plan, torch.float16 if owner.plan.limits.half else None
        order = getattr(plan.schedule or plan.policy, "order", 0)
        super().__init__(owner.clock, [not plan.ever(number)], half, order)
        self.owner, self.number = owner, number
        self.used: dict[Hashable, tuple[int, int]] = {}  # streams: last evaluation, reuses in a row
        self._stamp = (-1, -1)

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.owner.run
        stamp, on = (run.evaluation, run.call), run.on and self.owner.on
        if not on or run.call < 0 or stamp == self._stamp:  # twice in one call: as it is
            return original(*args, **kwargs)
        self._stamp, before = stamp, self.counts[1]
        out = super().__call__(original, module, *args, **kwargs)
        _, age = self.used.get(self.clock.streams, (0, 0))
        self.used[self.clock.streams] = run.evaluation, age + 1 if self.counts[1] > before else 0
        return out

    def may_reuse(self) -> bool:
        """In the very next evaluation, as often as the plan allows."""
        run, plan = self.owner.run, self.owner.plan
        last, age = self.used.get(self.clock.streams, (-1, 0))
        again = last == run.evaluation - 1
        free = plan.limits.longest == 0 or age < plan.limits.longest
        return again and free and plan.reuses(run, self.clock.step, self.number)
