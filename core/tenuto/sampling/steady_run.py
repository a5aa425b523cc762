"""`SteadyRun`: a pipeline's run of which each call is known without reading the device.

Reading it waits for all that the device still computes. What a call is then follows from objects:
its timestep is one of the scheduler's, its conditions are those of an earlier call.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from ..model import Rows, tensors_in

WATCHED = 2  # one more step is read in any case: whether images take turns shows in the first

Known = tuple[list["weakref.ref[Tensor]"], tuple[Hashable, ...]]


class SteadyRun:
    """One run of a pipeline. times: its scheduler's; uneven: whether a timestep comes twice.

    A timestep that comes twice for the same conditions may be another image's: from then on every
    call is read, as everywhere else.
    """

    def __init__(self, times: Any, uneven: bool) -> None:
        self.times, self.uneven = times, uneven
        self.values: list[float] | None = None
        self.read: set[float] = set()  # timesteps, while few
        self.last: dict[Hashable, float] = {}  # the timestep of the last call of the same streams
        self.streams: dict[Hashable, Known] = {}
        self.turns = False

    @property
    def calm(self) -> bool:
        """Whether calls go on from step to step, so that no sample needs to be looked at."""
        return not self.turns and len(self.read) > WATCHED

    def find(
        self, timestep: Any, batch: int, conditions: Sequence[Rows], which: str
    ) -> tuple[float, tuple[Hashable, ...]] | None:
        """(timestep, streams) of a call; None where the device has to be read for it."""
        if not self.calm:
            return None
        tensors = list(tensors_in(list(conditions)))
        known = self.streams.get(_key(tensors, batch, which))
        if known is None or any(ref() is not t for ref, t in zip(known[0], tensors, strict=True)):
            return None
        time = self._time(timestep)
        if time is None or self._again(time, (known[1], which)):
            return None
        return time, known[1]

    def _again(self, time: float, streams: Hashable) -> bool:
        """Whether the streams had a call at this timestep just before."""
        again = self.last.get(streams) == time and not self.uneven
        self.turns |= again
        self.last[streams] = time
        return again

    def learn(
        self,
        time: float,
        streams: tuple[Hashable, ...],
        batch: int,
        conditions: Sequence[Rows],
        which: str,
    ) -> None:
        """What reading the device has told of a call."""
        self._again(time, (streams, which))
        if len(self.read) <= WATCHED:
            self.read.add(time)
        tensors = list(tensors_in(list(conditions)))
        if tensors and not any(t.is_inference() for t in tensors):  # those have no version
            if len(self.streams) > 16:
                self.streams.clear()
            refs = [weakref.ref(t) for t in tensors]
            self.streams[_key(tensors, batch, which)] = refs, streams

    def _time(self, timestep: Any) -> float | None:
        """A timestep that is on the host, or a view of one of the scheduler's; None: it is not."""
        if not isinstance(timestep, Tensor):
            return float(timestep) if isinstance(timestep, int | float) else None
        alike = timestep.numel() == 1 or (timestep.ndim == 1 and timestep.stride(0) == 0)
        if not alike:
            return None
        if timestep.device.type == "cpu":
            return float(timestep.flatten()[0])
        place = place_in(self.times, timestep)
        if place is None:
            return None
        if self.values is None:
            self.values = [float(t) for t in self.times.tolist()]
        return self.values[place]


def place_in(times: Any, timestep: Tensor) -> int | None:
    """Which of `times` a timestep is a view of, by where it lies in memory; None: of none.

    times: as a scheduler has them, (T,). timestep: one number, once or repeated without a copy.
    """
    if not isinstance(times, Tensor) or times.ndim != 1 or times.stride(0) != 1:
        return None
    if times.dtype is not timestep.dtype or times.device != timestep.device:
        return None
    if times.untyped_storage().data_ptr() != timestep.untyped_storage().data_ptr():
        return None
    place = int(timestep.storage_offset() - times.storage_offset())
    return place if 0 <= place < len(times) else None


def _key(tensors: Sequence[Tensor], batch: int, which: str) -> Hashable:
    if any(t.is_inference() for t in tensors):
        return None
    return batch, which, *((id(t), t._version) for t in tensors)
