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
        self.exact = False
        self.streams: tuple[Hashable, ...] = ()
        self.run = 0
        self._grid = torch.tensor(self.timesteps, dtype=torch.float64)
        self._slack = max((abs(t) for t in self.timesteps), default=0.0) / 2000
        self._owner: weakref.ref[Tensor] | None = None
        self._marks: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        return self  # a copied model follows the same run

    def begin(self) -> None:
        """Start a new run: whatever was held belongs to the last one."""
        self.run += 1
        self.row = 0

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
        self, timestep: Tensor | float, batch: int, conditions: Sequence[Tensor], device: Any
    ) -> None:
        """`tick` for a bare denoiser call; reads the device once.

        timestep: a number, (), (1,) or (batch,); where its rows differ the first one counts and the
        step is not exact. conditions: tensors with `batch` rows or one for
        all (prompt embeddings, labels); rows with equal conditions are told apart by their order.
        """
        self._follow_owner(timestep)
        value = _spread(torch.as_tensor(timestep).detach().reshape(-1))
        marks = [self._mark(c) for c in conditions if c.ndim and c.shape[0] in (1, batch)]
        if not marks:
            self._arrive(value.cpu(), range(batch), device)
            return
        hashes = _row_hash(torch.stack([m.expand(batch) for m in marks], dim=1))
        packed: list[int] = torch.cat((value.view(torch.int64).to(hashes.device), hashes)).tolist()  # pyright: ignore
        step = torch.tensor(packed[:2], dtype=torch.int64).view(torch.float64)
        self._arrive(step, _numbered(packed[2:]), device)

    def _arrive(self, step: Tensor, streams: Sequence[Hashable], device: Any) -> None:
        self.tick(float(step[0]), streams, device)
        self.exact = self.exact and float(step[1]) <= self._slack

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

    def _follow_owner(self, timestep: Tensor | float) -> None:
        """A scheduler makes new `timesteps` for every run: an element of others is a new run.

        One element, repeated at most: k-diffusion hands out a view of what it has just computed.
        """
        base = timestep._base if isinstance(timestep, Tensor) else None
        if base is None or base.numel() < 2:
            return
        assert isinstance(timestep, Tensor)
        if timestep.numel() > 1 and any(timestep.stride()):
            return
        if self._owner is not None and self._owner() is not base:
            self.begin()
        self._owner = weakref.ref(base)


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
