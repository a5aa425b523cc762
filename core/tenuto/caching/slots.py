"""Stored outputs, by stream: of one branch, or of whole calls."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..model import map_tensors, tensors_in
from ..sampling import Clock


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

    def of_calls(self) -> CallSlot:
        """An empty one for whole calls."""
        return CallSlot(self.dtype)

    def store(self, clock: Clock, shape: Any, out: Any) -> None:
        """Keep `out`, (B, ...) or such tensors in a container, for the streams of the call."""
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
