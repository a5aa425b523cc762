"""`Clock`: where a sampling run stands. The one mutable fact of the library.

The host supplies the timestep; the clock maps it to the nearest calibrated step, names the streams
in the batch and tells when a new run begins. Nothing counts calls, nothing is matched exactly.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..model import Rows, times_of
from .further import Further
from .grid import grid_from
from .samples import Samples, Seen, numbered, same_step, some_values, values_of


class Clock:
    """Step, streams and run of the sampling run in progress.

    timesteps: the calibrated timesteps in executed order (noisiest first).
    index: the nearest calibrated step, int64 (1,), on the device, in the same memory at every step;
    read it with `index_select`.
    step: the same as a host integer.
    exact: whether the timestep is a calibrated one, up to half a thousandth of the largest.
    streams: one id per row of the batch; equal ids in two calls are the same image's same half.
    run: a number that grows with every new sampling run; stored features never cross runs.
    grid: the timesteps of the run from its first one on, () where the host does not say them;
    place: the nearest of them; per_step: how many of them a step of the scheduler has. whole: how
    many the run has, where other denoisers have the rest. reads: who else computes on the device
    what is read of a call, reads(function, arguments): as a CUDA graph. further: the rows that
    tables have beyond those of the calibrated steps.

    A run begins where the host says so (`begin`, `starts`), where the noise level rises, and where
    a sample arrives that cannot be of the run in progress (see `Samples`). Of a scheduler of
    second order (`uneven`), which may rise within a run, only the first of these counts.
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps = tuple(float(t) for t in timesteps)
        with torch.inference_mode(False):
            self.index = torch.zeros(1, dtype=torch.int64)
        self.step = 0
        self.exact = False
        self.streams: tuple[Hashable, ...] = ()
        self.run = 0
        self.grid: tuple[float, ...] = ()
        self.place = self.whole = 0
        self.per_step = 1.0
        self.reads: Callable[..., Tensor] | None = None
        self.further = Further()
        self._offered: Any = None
        self._grid = torch.tensor(self.timesteps, dtype=torch.float64)
        self._slack = max((abs(t) for t in self.timesteps), default=0.0) / 2000
        self._falls = self.timesteps[:1] >= self.timesteps[-1:]  # with the noise
        self.uneven = False  # whether the host's scheduler is of second order, or rises in a run
        self.stochastic = False  # whether it adds noise of its own at every step
        pairs = zip(self.timesteps, self.timesteps[1:], strict=False)
        self._doubled = any(abs(a - b) <= self._slack for a, b in pairs)  # so was the calibrated
        self._time: float | None = None
        self._source: tuple[Any, ...] = ()
        self._samples = Samples(self._slack if self._doubled else 0.0)
        self._marks: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        """A clock of its own at the same step: what is copied with it shares the copy."""
        clone = type(self)(self.timesteps)
        memo[id(self)] = clone
        clone.index, clone.step, clone.exact = self.index.clone(), self.step, self.exact
        clone.streams, clone.run, clone.uneven = self.streams, self.run, self.uneven
        clone.grid, clone.place, clone.whole = self.grid, self.place, self.whole
        clone.per_step, clone.stochastic = self.per_step, self.stochastic
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            "A model with an attached artifact cannot be pickled (torch.save does): detach() first."
        )

    def begin(self) -> None:
        """Start a new run: whatever was stored belongs to the last one."""
        self.run += 1
        self.step, self._time = 0, None
        self.grid, self.place = (), 0
        self._samples.clear()

    def starts(self, *source: Any, times: Any = None) -> bool:
        """What the host made for its run: other objects than in the last call are a new run.

        times: its timesteps, in whatever unit it counts them.
        """
        known = len(source) == len(self._source)
        if known and all(a is b for a, b in zip(source, self._source, strict=True)):
            return False
        self._source = source  # kept, so that no other object gets its place in memory
        self._offered, self.whole = times, 0
        self.begin()
        return True

    @property
    def time(self) -> float:
        """The timestep of the last call; NaN before the first one of a run."""
        return math.nan if self._time is None else self._time

    def among(self, times: Any) -> None:
        """Only these of the timesteps that the host has said (`starts`) are this denoiser's."""
        if times is not self._offered:
            self.whole, self._offered = len(self._offered), times

    def nearest(self, timestep: float) -> int:
        """The calibrated step nearest to `timestep`."""
        return int((self._grid - timestep).abs().argmin())

    def tick(self, timestep: float, streams: Sequence[Hashable], device: Any = "cpu") -> None:
        """Move to `timestep` (same unit as `timesteps`); more noise than before is a new run."""
        step = self._step(timestep)
        if self._rises(timestep):
            self.begin()
        self.step, self._time, self.streams = step, timestep, tuple(streams)
        self.exact = step < len(self.timesteps) and (
            abs(self.timesteps[step] - timestep) <= self._slack
        )
        self._move(step, device)
        self.further.move(None if self.exact else timestep, device)
        place = self._place(timestep)
        self.place = place if self.grid else 0

    def _move(self, step: int, device: Any) -> None:
        """`index` at `step`, in the memory that it has: compiled code and CUDA graphs read it."""
        if self.index.device != torch.empty(0, device=device).device:
            with torch.inference_mode(False):  # or no call outside of it could write to it
                self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.index.fill_(step)

    def _place(self, timestep: float) -> int:
        """Which step of the run that is: of the run's own, else of the calibrated ones."""
        if not self.grid and self._offered is not None:
            self.grid = grid_from(self._offered, timestep)
        if self.grid:
            return min(range(len(self.grid)), key=lambda i: abs(self.grid[i] - timestep))
        return self._step(timestep)

    def _step(self, timestep: float) -> int:
        return self.nearest(timestep) if self.timesteps else 0

    def _rises(self, timestep: float) -> bool:
        """Whether there is more noise at `timestep` than at the last call of this run."""
        if self._time is None or same_step(timestep, self._time) or self.uneven:
            return False
        if self._doubled and abs(timestep - self._time) <= self._slack:
            return False
        falls = self._falls if self.timesteps else self.grid[:1] >= self.grid[-1:]
        return (timestep > self._time) == falls

    def observe(
        self,
        timestep: Tensor | float,
        batch: int,
        conditions: Sequence[Rows],
        device: Any,
        sample: Rows | None = None,
        which: str = "",
    ) -> None:
        """`tick` for a bare denoiser call; reads the device once.

        timestep: as `times_of` takes it; where its rows differ the first one counts and the step is
        not exact. conditions: tensors with `batch` rows or one for all (prompt embeddings, labels),
        or lists of a tensor a row; rows with equal conditions differ by their order.
        sample: the noisy sample, (batch, ...); it shows new runs that the timesteps don't.
        which: a pass of a step beside the usual ones; its streams are others.
        """
        whole = [c for c in conditions if _has_rows(c, batch)]
        folded = [] if whole else _folded(conditions, batch)
        marks, given = whole or folded, (times_of(timestep, batch), whole, folded, sample)
        if self.reads is None:
            read = _read(*given, batch, self._marks_of)
        else:
            read = self.reads(functools.partial(_read, batch=batch), given)
        packed: list[int] = read.tolist()  # pyright: ignore
        step = torch.tensor(packed[:2], dtype=torch.int64).view(torch.float64)
        first, spread = float(step[0]), float(step[1])
        rest = packed[2:]
        streams: Sequence[Hashable] = range(batch)
        if marks:
            streams, rest = numbered(rest[:batch]), rest[batch:]
        if which:
            streams = [(stream, which) for stream in streams]
        if self._rises(first):
            self.begin()
        if sample is not None and not self.uneven:
            self._compare(first, streams, rest[:batch], rest[batch:])
        self.tick(first, streams, device)
        self.exact = self.exact and spread <= self._slack
        if spread > 0:
            self.further.mix(self.exact)

    def _compare(
        self, step: float, streams: Sequence[Hashable], marks: list[int], values: list[int]
    ) -> None:
        """Begin a run where the samples of a call are not of the one in progress."""
        row, count = self._place(step), len(values) // max(1, len(marks))
        found = [
            Seen(step, row, mark, values_of(values[i * count : (i + 1) * count]))
            for i, mark in enumerate(marks)
        ]
        if not self._samples.go_on(streams, found):
            self.begin()
            self._samples.restart(streams, found)

    def _marks_of(self, condition: Rows) -> Tensor:
        """The row hash of a condition: int64 (B,) or (1,)."""
        if isinstance(condition, Tensor):
            return self._mark(condition)
        return torch.cat([_row_hash(self._mark(row)[None]) for row in condition])

    def _mark(self, condition: Tensor) -> Tensor:
        """`_row_hash` of a tensor; one that is the same object as before is not read again."""
        if condition.is_inference():
            return _row_hash(condition)  # has no version: it could have been written to
        known = self._marks.get(id(condition))
        if known is not None and known[0]() is condition and known[1] == condition._version:
            return known[2]
        if len(self._marks) > 16:
            self._marks.clear()
        mark = _row_hash(condition)
        self._marks[id(condition)] = (weakref.ref(condition), condition._version, mark)
        return mark


def _read(
    times: Tensor,
    whole: Sequence[Rows],
    folded: Sequence[Tensor],
    sample: Rows | None,
    batch: int,
    mark: Callable[[Rows], Tensor] | None = None,
) -> Tensor:
    """All that is read of a call, int64: the bits of the timestep and its spread in float64, then

    of each row a hash of the conditions (if any), one of the sample, and some values of that.
    """
    marks = [*map(mark or _row_hash, whole), *map(_row_hash, folded)]
    parts = [_row_hash(torch.stack([m.expand(batch) for m in marks], dim=1))] if marks else []
    if sample is not None:
        parts += [_row_hash(sample), some_values(sample).flatten()]
    parts = [_spread(times).view(torch.int64), *parts]
    return torch.cat([part.to(parts[-1].device) for part in parts])


def _spread(steps: Tensor) -> Tensor:
    """The first timestep of a batch and how far apart they are: float64 (2,)."""
    steps = steps.to(torch.float64)
    if len(steps) == 1 or steps.stride(0) == 0:
        return torch.stack((steps[0], torch.zeros_like(steps[0])))
    return torch.stack((steps[0], steps.amax() - steps.amin()))


def _has_rows(condition: Rows, batch: int) -> bool:
    """Whether a condition has a row for each of the batch, or one for all."""
    if isinstance(condition, Tensor):
        return bool(condition.ndim) and condition.shape[0] in (1, batch)
    return len(condition) == batch


def _folded(conditions: Sequence[Rows], batch: int) -> list[Tensor]:
    """Conditions with several rows a sample, such as a prompt for every frame: (batch, rows, ...).

    Of three dimensions or more: others are places of tokens, which are no sample's.
    """
    found = (c for c in conditions if isinstance(c, Tensor) and c.ndim > 2)
    return [c.unflatten(0, (batch, -1)) for c in found if len(c) and len(c) % batch == 0]


def _row_hash(x: Rows) -> Tensor:
    """A hash of each row of `x` (B, ...), of every value and its place: int64 (B,).

    Each value is mixed with its place before the sum: a sum of products would not tell rows of
    few values apart, such as masks and sizes, (5, 0, 0, 5) from (0, 5, 5, 0).
    """
    if not isinstance(x, Tensor):
        return torch.cat([_row_hash(row[None]) for row in x])
    rows = x.detach().reshape(x.shape[0], -1 if x.numel() else 0)
    if rows.is_floating_point():
        rows = rows.to(torch.float32).contiguous().view(torch.int32)
    places = torch.arange(1, rows.shape[1] + 1, device=rows.device) * 0x9E3779B1
    mixed = (rows.to(torch.int64) ^ places).mul_(0x2545F4914F6CDD1D)
    mixed.bitwise_xor_(mixed >> 29).mul_(0x369DEA0F31A53F85)
    return mixed.bitwise_xor_(mixed >> 32).sum(1)
