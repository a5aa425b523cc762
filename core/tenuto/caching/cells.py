"""What executes a cache schedule: a branch's forward computes, or reuses its last output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model import WHOLE, Override, Signature, describe, map_tensors, override_, tensors_in
from ..sampling import Clock
from .history import History
from .schedule import CacheSchedule
from .slots import Slot

compiling = getattr(torch.compiler, "is_compiling", bool)  # torch 2.1 has none: False


def shape_of(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int = 0) -> Any:
    """What a branch's input must share with an earlier one: shape without batch, dtype, device.

    Of its first tensor, by place or by name. batch: how many samples the call has; its first
    dimension may be that many times something, which must be equal too.
    """
    first = next(tensors_in((args, kwargs)))
    share = len(first) / batch if batch and first.ndim else 1.0
    return share, tuple(first.shape[1:]), first.dtype, first.device


class CachedBranch:
    """The forward of a branch under a schedule: compute and store, or reuse what is stored.

    rows: whether a step computes. dtype: what is kept in, if not as it is. order: above 0, what is
    not computed is extrapolated from the last `order` + 1 outputs, by a series of that order.
    What is stored and what is returned are copies: models and hosts add to an output in place.

    In compiled code and CUDA graphs nothing may be looked up. Whoever calls `before` and `after`
    round each call of the denoiser sets `prepared`; then compiled code, and with `handed` all code,
    takes what is in `given` (None: it computes) and leaves what it computed in `made`.
    """

    prepared = handed = False

    def __init__(
        self, clock: Clock, rows: list[bool], dtype: torch.dtype | None = None, order: int = 0
    ) -> None:
        self.clock, self.rows = clock, rows
        self.slot: Slot | History = History(order, dtype) if order else Slot(dtype)
        self.keeps = not all(rows)
        self.counts = [0, 0]  # computed, reused
        self.given: Any = None
        self.made: Any = None

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.keeps:
            return original(*args, **kwargs)
        if self.handed or (self.prepared and compiling()):
            if self.given is not None:
                return map_tensors(Tensor.clone, self.given)
            out = original(*args, **kwargs)
            self.made = map_tensors(lambda t: t.detach().clone(), out)
            return out
        shape = self.shape(args, kwargs)
        if self.may_reuse():
            found = self.slot.find(self.clock, shape)
            if found is not None:
                self.counts[1] += 1
                return found
        out = original(*args, **kwargs)
        self.counts[0] += 1
        self.slot.store(self.clock, shape, map_tensors(Tensor.detach, out))
        return out

    def before(self, shape: Any) -> None:
        """Look up what the denoiser's next call reuses; shape: what it must share with others."""
        self.made = None
        wanted = self.keeps and self.may_reuse()
        self.given = self.slot.find(self.clock, shape) if wanted else None

    def after(self, shape: Any) -> None:
        """Keep what the call made."""
        if self.made is not None:
            self.slot.store(self.clock, shape, self.made)
        self.counts[0] += self.made is not None
        self.counts[1] += self.given is not None
        self.given = self.made = None

    def shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call must share with an earlier one."""
        return shape_of(args, kwargs, len(self.clock.streams))

    def may_reuse(self) -> bool:
        """Whether the schedule reuses here."""
        return not self.rows[self.clock.step]


class RunTable:
    """A schedule at the timesteps of the run in progress.

    Where a host does not say them, each step takes the nearest row of the schedule itself.
    """

    def __init__(self, schedule: CacheSchedule, clock: Clock) -> None:
        self.schedule, self.clock = schedule, clock
        self._known: dict[tuple[Any, ...], list[list[bool]]] = {}
        self._rows = schedule.table[schedule.rows(clock.timesteps)].tolist()

    def computes(self, branch: int) -> bool:
        """Whether the branch of this number computes in the step at which the clock is."""
        clock = self.clock
        if not clock.grid:
            return self._rows[clock.step][branch]
        key = (*clock.grid, clock.whole)
        rows = self._known.get(key)
        if rows is None:
            if len(self._known) > 8:
                self._known.clear()
            steps = round((clock.whole or len(clock.grid)) / clock.per_step)
            rows = self._known[key] = self.schedule.at(clock.grid, steps).table.tolist()
        return rows[clock.place][branch]


class ScheduledBranch(CachedBranch):
    """A branch under a schedule, at whatever steps a run has."""

    def __init__(self, table: RunTable, number: int) -> None:
        schedule = table.schedule
        super().__init__(table.clock, schedule.table[:, number].tolist(), order=schedule.order)
        self.table, self.number = table, number

    def may_reuse(self) -> bool:
        """As the schedule of the run says."""
        return not self.table.computes(self.number)


def apply_schedule_(denoiser: nn.Module, schedule: CacheSchedule, clock: Clock) -> list[Override]:
    """Put `schedule` on `denoiser`: one override per branch. The clock must follow the denoiser."""
    table = RunTable(schedule, clock)
    cells = [ScheduledBranch(table, number) for number in range(len(schedule.branches))]
    return [
        override_(denoiser.get_submodule(name), for_branch(cell, name, denoiser))
        for name, cell in zip(schedule.branches, cells, strict=True)
    ]


def apply_policy_(denoiser: nn.Module, policy: Any, clock: Clock) -> list[Override]:
    """Put a policy on `denoiser`: its own way where it has one (`apply_`), else its schedule.

    The schedule is made for the clock's timesteps and the branches of the model, or for those that
    the policy names (`branches_of`).
    """
    if hasattr(policy, "apply_"):
        return policy.apply_(denoiser, clock)
    if isinstance(policy, CacheSchedule):
        return apply_schedule_(denoiser, policy, clock)
    if hasattr(policy, "branches_of"):
        branches = policy.branches_of(denoiser)
    else:
        branches = tuple(branch.name for branch in describe(denoiser).branches)
    return apply_schedule_(denoiser, policy(clock.timesteps, branches), clock)


class CallShape:
    """What a whole call must share with an earlier one: the sample's shape, of a list each one's.

    A call that fills a cache of the model's own for calls after it is like no other.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.facts = Signature(denoiser)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: bool = False) -> Any:
        inputs = self.facts.inputs(args, kwargs)
        if self.facts.fills(inputs):
            return object()
        sample = self.facts.sample(inputs)
        first = int(rows and isinstance(sample, Tensor))  # of a tensor each row may stand alone
        return tuple((tuple(x.shape[first:]), x.dtype, x.device) for x in tensors_in(sample))


def for_branch(cell: Any, name: str, denoiser: nn.Module) -> Any:
    """`cell`, which has a `slot` and a `shape`, for the branch `name`; changed for whole calls."""
    if name == WHOLE.name:
        cell.slot, cell.shape = cell.slot.of_calls(), CallShape(denoiser)
    return cell
