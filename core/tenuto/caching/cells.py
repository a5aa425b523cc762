"""What executes a cache schedule: a branch's forward computes, or reuses its last output."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import WHOLE, Override, Signature, map_tensors, override_, tensors_in
from ..sampling import Clock
from .schedule import CacheSchedule

compiling = getattr(torch.compiler, "is_compiling", bool)  # torch 2.1 has none: False


class Slot:
    """Stored outputs of one branch, by stream. Another run, shape or an unknown stream computes.

    The first dimension need not be the batch: frames are folded into it, or tokens. Such outputs
    are reused only by a call of exactly the same streams, in the same order.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype  # of what is kept, where it is not the output's
        self.output_dtype: torch.dtype | None = None  # what is returned then
        self.run: int | None = None
        self.stored: dict[Hashable, tuple[Any, int, Any]] = {}
        self.calls: dict[tuple[Hashable, ...], tuple[Any, Any]] = {}  # of outputs without rows
        self.last: tuple[tuple[Hashable, ...], Any, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot(self.dtype)

    def store(self, clock: Clock, shape: Any, out: Any) -> None:
        """Keep a copy of `out`, (B, ...) or such tensors in a container, for the call's streams."""
        if self.run != clock.run:
            self.stored.clear()
            self.calls.clear()
            self.run = clock.run
        if self.dtype is not None:
            self.output_dtype = next(tensors_in(out)).dtype
        out = map_tensors(lambda t: t.to(self.dtype or t.dtype, copy=True), out)
        self.last = (clock.streams, shape, out)
        if any(not t.ndim or len(t) != len(clock.streams) for t in tensors_in(out)):
            for streams in [s for s in self.calls if not {*s}.isdisjoint(clock.streams)]:
                del self.calls[streams]
            self.calls[clock.streams] = (shape, out)
            return
        for row, stream in enumerate(clock.streams):
            self.stored[stream] = (out, row, shape)

    def detach_(self) -> None:
        """Detach what is stored from the graph that made it."""
        if self.last is not None:
            self.last = (*self.last[:2], map_tensors(Tensor.detach, self.last[2]))
        for stream, (out, row, shape) in self.stored.items():
            self.stored[stream] = (map_tensors(Tensor.detach, out), row, shape)
        for streams, (shape, out) in self.calls.items():
            self.calls[streams] = (shape, map_tensors(Tensor.detach, out))

    def find(self, clock: Clock, shape: Any) -> Any:
        """What is stored for the streams of the call, or None where any is missing."""
        if self.run != clock.run or self.last is None:
            return None
        streams, old, out = self.last
        if streams != clock.streams and clock.streams in self.calls:
            streams, (old, out) = clock.streams, self.calls[clock.streams]
        if streams == clock.streams and old == shape:
            return map_tensors(lambda t: t.to(self.output_dtype or t.dtype, copy=True), out)
        found = [self.stored.get(stream) for stream in clock.streams]
        rows = [(f[0], f[1]) for f in found if f is not None and f[2] == shape]
        if not rows or len(rows) < len(found):
            return None

        def gathered(*parts: Tensor) -> Tensor:
            whole = torch.stack([part[row] for part, (_, row) in zip(parts, rows, strict=True)])
            return whole.to(self.output_dtype or whole.dtype)

        return map_tensors(gathered, *(outputs for outputs, _ in rows))

    def bytes(self) -> int:
        """What is stored now."""
        kept = {id(out): out for out, _, _ in self.stored.values()}
        kept |= {id(out): out for _, out in self.calls.values()}
        return sum(t.numel() * t.element_size() for out in kept.values() for t in tensors_in(out))


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

    rows: whether a step computes. dtype: what is kept in, if not as it is.
    What is stored and what is returned are copies: models and hosts add to an output in place.

    In compiled code and CUDA graphs nothing may be looked up. Whoever calls `before` and `after`
    round each call of the denoiser sets `prepared`; then compiled code, and with `handed` all code,
    takes what is in `given` (None: it computes) and leaves what it computed in `made`.
    """

    prepared = handed = False

    def __init__(self, clock: Clock, rows: list[bool], dtype: torch.dtype | None = None) -> None:
        self.clock, self.rows, self.slot = clock, rows, Slot(dtype)
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
        super().__init__(table.clock, table.schedule.table[:, number].tolist())
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


class CallSlot(Slot):
    """Stored outputs of whole calls, by the streams of each: lists and packed rows have no rows."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__(dtype)
        self.slots: dict[tuple[Hashable, ...], Slot] = {}

    def store(self, clock: Clock, shape: Any, out: Any) -> None:
        """Keep `out` for the streams of the call, in their order; what is older of them goes."""
        if self.run != clock.run:
            self.slots.clear()
            self.run = clock.run
        for old in [old for old in self.slots if not {*old}.isdisjoint(clock.streams)]:
            del self.slots[old]
        found = self.slots[clock.streams] = Slot(self.dtype)
        found.store(clock, shape, out)

    def find(self, clock: Clock, shape: Any) -> Any:
        """What the last call of just these streams returned, or None."""
        known = self.slots.get(clock.streams) if self.run == clock.run else None
        return None if known is None else known.find(clock, shape)

    def bytes(self) -> int:
        """What is stored now."""
        return sum(slot.bytes() for slot in self.slots.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> CallSlot:
        return CallSlot(self.dtype)


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
        cell.slot, cell.shape = CallSlot(cell.slot.dtype), CallShape(denoiser)
    return cell
