"""Branches held from evaluation to evaluation, by a plan: what a run reuses and what it counts.

Layers are patched, not the sequences that hold them: reForge walks the layers of a block and never
calls the block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tenuto.caching import CacheSchedule
from tenuto.model import Override, map_tensors, override_, tensors_in
from tenuto.sampling import Clock

from .run import Run


@dataclass(frozen=True, eq=False)
class Plan:
    """When to reuse. schedule: a table, read at the nearest timestep; None: one step of `interval`.

    start, stop: shares of the steps between which anything is reused. last: compute the last step.
    longest: how often in a row a branch is reused; 0: no limit. half: keep fp16.
    """

    schedule: CacheSchedule | None = None
    interval: int = 1
    start: float = 0.0
    stop: float = 1.0
    last: bool = False
    longest: int = 0
    half: bool = False

    def reuses(self, run: Run, row: int, branch: int) -> bool:
        """Whether this branch may be reused in the step at which `run` is."""
        first = math.ceil(self.start * run.steps - 1e-9)
        past = run.step >= math.ceil(self.stop * run.steps - 1e-9) and self.stop < 1
        if run.step < first or past or (self.last and run.last):
            return False
        if self.schedule is None:
            return (run.step - first) % self.interval != 0
        return not bool(self.schedule.table[row, branch])

    def ever(self, branch: int) -> bool:
        """Whether the branch is reused at any time: others are left alone."""
        if self.schedule is None:
            return self.interval > 1
        return not bool(self.schedule.table[:, branch].all())


@dataclass
class Kept:
    """One output. age: how often it was handed out; seen: the evaluation that used it last."""

    shape: Any
    out: Any
    dtype: torch.dtype
    epoch: int
    seen: int
    age: int = 0


class Cache:
    """A plan in use on branches. computed, reused: calls since then, and `grid` by evaluation.

    branches: the denoiser's own names.
    """

    def __init__(self, plan: Plan, branches: tuple[str, ...], run: Run) -> None:
        self.plan, self.branches, self.run = plan, branches, run
        self.clock = Clock(plan.schedule.timesteps if plan.schedule is not None else ())
        self.calls = [BranchCall(self, number) for number in range(len(branches))]
        run.clocks.append(self.clock)

    def overrides(self, denoiser: nn.Module) -> list[Override]:
        """One a branch that is ever reused."""
        return [
            override_(denoiser.get_submodule(name), call)
            for name, call in zip(self.branches, self.calls, strict=True)
            if self.plan.ever(call.number)
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
        kept = (k.out for call in self.calls for k in call.kept.values())
        return sum(t.numel() * t.element_size() for out in kept for t in tensors_in(out))


class BranchCall:
    """The forward of one branch: its own, or what it gave in the evaluation before.

    What is kept is found by the number of the denoiser call in its evaluation and of the branch
    call in that, and by the input's shape with its batch: hosts order the halves of guidance as
    they like. What does not fit is computed.
    """

    def __init__(self, owner: Cache, number: int) -> None:
        self.owner, self.number = owner, number
        self.kept: dict[tuple[int, int], Kept] = {}
        self.counts = [0, 0]  # computed, reused
        self._stamp: tuple[int, int] = (-1, -1)
        self._nth = 0

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run, owner = self.owner.run, self.owner
        if not run.on or run.call < 0:
            return original(*args, **kwargs)
        stamp = run.evaluation, run.call
        self._nth = self._nth + 1 if stamp == self._stamp else 0
        self._stamp = stamp
        key, first = (run.call, self._nth), next(tensors_in((args, kwargs)))
        shape = tuple(first.shape), first.dtype, first.device, run.tag
        found = self.kept.get(key)
        if found is not None and self._usable(found, shape):
            found.age, found.seen = found.age + 1, run.evaluation
            self.counts[1] += 1
            return map_tensors(lambda t: t.to(found.dtype, copy=True), found.out)
        out = original(*args, **kwargs)
        self.counts[0] += 1
        dtype = next(tensors_in(out)).dtype
        stored = torch.float16 if owner.plan.half else dtype
        kept = map_tensors(lambda t: t.detach().to(stored, copy=True), out)
        self.kept[key] = Kept(shape, kept, dtype, run.epoch, run.evaluation)
        return out

    def _usable(self, found: Kept, shape: Any) -> bool:
        run, plan = self.owner.run, self.owner.plan
        return (
            found.shape == shape
            and found.epoch == run.epoch
            and found.seen == run.evaluation - 1
            and (plan.longest == 0 or found.age < plan.longest)
            and plan.reuses(run, self.owner.clock.row, self.number)
        )
