"""`Clock`: where a sampling run stands. The one mutable fact of the library.

The host supplies the timestep; the clock maps it to the nearest calibrated step, names the streams
in the batch and tells when a new run begins. Nothing counts calls, nothing is matched exactly.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError

CONTINUES = 1.0  # of a sample's norm: how far it may move between the evaluations of one step

active: ContextVar[Clock | None] = ContextVar("tenuto_clock", default=None)


class Clock:
    """Step, streams and run of the sampling run in progress.

    timesteps: the calibrated timesteps in executed order (noisiest first).
    index: the nearest calibrated step, int64 (1,), on the device; read it with `index_select`.
    row: the same as a host integer.
    exact: whether the timestep is a calibrated one, up to half a thousandth of the largest.
    streams: one id per row of the batch; equal ids in two calls are the same picture's same half.
    run: a number that grows with every new sampling run; held features never cross runs.
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps = tuple(float(t) for t in timesteps)
        self.index = torch.zeros(1, dtype=torch.int64)
        self.row = 0
        self.exact: bool = False
        self.streams: tuple[Hashable, ...] = ()
        self.run = 0
        self._grid = torch.tensor(self.timesteps, dtype=torch.float64)
        self._slack = max((abs(t) for t in self.timesteps), default=0.0) / 2000
        self._fresh()
        self._marks: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        """A copied model has a clock of its own, which its copied hook keeps."""
        clone = memo[id(self)] = Clock(self.timesteps)
        clone.index, clone.row, clone.exact = self.index.clone(), self.row, self.exact
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            "A model with an attached artifact cannot be pickled (torch.save does): detach() first."
        )

    def begin(self) -> None:
        """Start a new run: whatever was held belongs to the last one."""
        self.run += 1
        self.row = 0
        self._fresh()

    def _fresh(self) -> None:
        self._step: float | None = None  # the last timestep seen, as it was given
        self._steps = 0  # how many there were in this run
        self._seen: dict[Hashable, int] = {}  # how often each stream came at that timestep
        self._once = False  # whether a step between the first and that one was evaluated once
        self._samples: list[Tensor] = []  # of the calls at that timestep

    def nearest(self, timestep: float) -> int:
        """The calibrated step nearest to `timestep`."""
        return int((self._grid - timestep).abs().argmin())

    def tick(self, timestep: float, streams: Sequence[Hashable], device: Any = "cpu") -> None:
        """Move to `timestep` (same unit as `timesteps`); going back in time starts a new run."""
        row = self.nearest(timestep) if self.timesteps else 0
        if row < self.row:
            self.begin()
        self.row, self.streams = row, tuple(streams)
        self.exact = row < len(self.timesteps) and (
            abs(self.timesteps[row] - timestep) <= self._slack
        )
        self.index = torch.tensor([row], device=device)

    def observe(
        self,
        timestep: Tensor | float,
        batch: int,
        conditions: Sequence[Tensor],
        device: Any,
        sample: Tensor | None = None,
    ) -> None:
        """`tick` for a bare denoiser call; reads the device once.

        A run begins where the noise level rises, and, if `sample` (batch, ...) is given, where a
        stream comes again at the timestep at which it was with another image: see `_arrive`.

        timestep: a number, (), (1,) or (batch,); where its rows differ the first one counts and the
        step is not exact. conditions: tensors with `batch` rows or one for
        all (prompt embeddings, labels); rows with equal conditions are told apart by their order.
        """
        value = _spread(torch.as_tensor(timestep).detach().reshape(-1))
        value = torch.cat((value, self._jump(sample).to(value)))
        marks = [self._mark(c) for c in conditions if c.ndim and c.shape[0] in (1, batch)]
        if not marks:
            self._arrive(value.cpu(), range(batch), device, sample)
            return
        hashes = _row_hash(torch.stack([m.expand(batch) for m in marks], dim=1))
        packed: list[int] = torch.cat((value.view(torch.int64).to(hashes.device), hashes)).tolist()  # pyright: ignore
        step = torch.tensor(packed[:3], dtype=torch.int64).view(torch.float64)
        self._arrive(step, _numbered(packed[3:]), device, sample)

    def _arrive(
        self, step: Tensor, streams: Sequence[Hashable], device: Any, sample: Tensor | None
    ) -> None:
        """A stream that comes again at one timestep is either the second evaluation of a step, or
        a run that begins where the last one was left: after a run of this one timestep, or of
        steps that were evaluated once, at the third time, or with quite another sample.
        """
        time, spread, jump = _numbers(step)
        again = max((self._seen.get(s, 0) for s in streams), default=0)
        if (
            sample is not None
            and time == self._step
            and again
            and (self._steps == 1 or self._once or again > 1 or jump > CONTINUES)
        ):
            self.begin()
        self.tick(time, streams, device)
        self.exact = self.exact and spread <= self._slack
        if sample is None:
            return
        if time != self._step:
            self._once = self._once or (self._steps > 1 and max(self._seen.values()) == 1)
            self._step, self._seen, self._steps = time, {}, self._steps + 1
            self._samples = []
        for stream in streams:
            self._seen[stream] = self._seen.get(stream, 0) + 1
        self._samples = [*self._samples[-3:], sample.detach().clone()]

    def _jump(self, sample: Tensor | None) -> Tensor:
        """How far `sample` is from the nearest of the last ones, relative to that: (1,)."""
        if sample is None or not self._samples:
            return torch.zeros(1)
        apart = [_apart(sample.detach(), other) for other in self._samples]
        return torch.stack(apart).amin().reshape(1)

    def _mark(self, condition: Tensor) -> Tensor:
        """The row hash of a condition; one that is the same object as before is not read again."""
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


def _spread(steps: Tensor) -> Tensor:
    """The first timestep of a batch and how far apart they are: float64 (2,)."""
    steps = steps.to(torch.float64)
    if len(steps) == 1 or steps.stride(0) == 0:
        return torch.stack((steps[0], torch.zeros_like(steps[0])))
    return torch.stack((steps[0], steps.amax() - steps.amin()))


def _row_hash(x: Tensor) -> Tensor:
    """A hash of each row of `x` (B, ...), of every value and its place: int64 (B,).

    Each value is mixed with its place before the sum: a sum of products would not tell rows of
    few values apart, such as masks and sizes, (5, 0, 0, 5) from (0, 5, 5, 0).
    """
    rows = x.detach().reshape(x.shape[0], -1)
    if rows.is_floating_point():
        rows = rows.to(torch.float32).contiguous().view(torch.int32)
    places = torch.arange(1, rows.shape[1] + 1, device=rows.device) * 0x9E3779B1
    mixed = (rows.to(torch.int64) ^ places).mul_(0x2545F4914F6CDD1D)
    mixed.bitwise_xor_(mixed >> 29).mul_(0x369DEA0F31A53F85)
    return mixed.bitwise_xor_(mixed >> 32).sum(1)


def _numbered(marks: Sequence[int]) -> list[tuple[int, int]]:
    """(mark, how many equal ones came before) for each mark."""
    seen: dict[int, int] = {}
    streams: list[tuple[int, int]] = []
    for mark in marks:
        seen[mark] = seen.get(mark, -1) + 1
        streams.append((mark, seen[mark]))
    return streams


def _numbers(x: Tensor) -> list[float]:
    return x.tolist()  # pyright: ignore


def _apart(x: Tensor, last: Tensor) -> Tensor:
    """The distance of `x` (B, ...) from `last`, relative to it, over the rows that both have."""
    if last.shape[1:] != x.shape[1:] or last.device != x.device:
        return torch.full((), torch.inf, device=x.device)
    rows = min(len(last), len(x))  # a batch may be split
    apart, size = ((y.float().square().sum().sqrt()) for y in (x[:rows] - last[:rows], last[:rows]))
    return apart / size.clamp(min=1e-12)
