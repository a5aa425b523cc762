"""The last outputs of a branch, and what a Taylor series from them says of a step to come."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import map_tensors
from ..sampling import Clock
from .slots import CallSlot, Slot


class History:
    """A slot that extrapolates: it keeps what the last computed steps returned, newest first.

    order: of the series, at most; with fewer outputs known of a stream it is lower, and 0 returns
    the last output. The variable is the timestep. dtype: as in `Slot`.
    """

    kind: type[Slot] = Slot

    def __init__(self, order: int, dtype: torch.dtype | None = None) -> None:
        self.order, self.dtype = order, dtype
        self.run: int | None = None
        self.kept: list[tuple[float, Slot]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> History:
        return self.like(self.kind)

    def like(self, kind: type[Slot]) -> History:
        """An empty one of such slots."""
        made = History(self.order, self.dtype)
        made.kind = kind
        return made

    def of_calls(self) -> History:
        """An empty one for whole calls."""
        return self.like(CallSlot)

    def store(self, clock: Clock, shape: Any, out: Any) -> None:
        """Keep what a computed step returned; a second call of the same step is beside it."""
        if self.run != clock.run:
            self.run, self.kept = clock.run, []
        if not self.kept or self.kept[0][0] != clock.time:
            self.kept = [(clock.time, self.kind(self.dtype)), *self.kept][: self.order + 1]
        self.kept[0][1].store(clock, shape, out)

    def find(self, clock: Clock, shape: Any) -> Any:
        """The series at the clock's step for the streams of the call, or None where none is kept.

        Only the newest outputs that all of its streams have, without a gap, take part.
        """
        times, outs = list[float](), list[Any]()
        for time, slot in self.kept:
            out = slot.find(clock, shape)
            if out is None:
                break
            times.append(time)
            outs.append(out)
        if not outs or self.run != clock.run:
            return None
        return outs[0] if len(outs) == 1 else combined(outs, taylor(times, clock.time))

    def bytes(self) -> int:
        """What is stored now."""
        return sum(slot.bytes() for _, slot in self.kept)


def taylor(times: Sequence[float], time: float) -> list[float]:
    """Weights of outputs at `times`, newest first, for the one at `time`.

    TaylorSeer (arXiv 2503.06923): the i-th derivative is the difference of the (i-1)-th at the two
    newest steps where it is known, over the newest gap; their series is the forecast.
    """
    # rows: the derivative of this order at each of the steps, as a combination of the outputs
    rows = torch.eye(len(times), dtype=torch.float64)
    found, ahead = torch.zeros(len(times), dtype=torch.float64), time - times[0]
    gaps = torch.tensor([a - b for a, b in itertools.pairwise(times)]).double()
    for order in range(len(times)):
        found += rows[0] * (ahead**order / math.factorial(order))
        rows = (rows[:-1] - rows[1:]) / gaps[: len(rows) - 1, None]
    return found.tolist()


def combined(outs: Sequence[Any], weights: Sequence[float]) -> Any:
    """sum_i weights[i] * outs[i] of equal containers of tensors, added up in fp32; all new."""

    def added(*tensors: Tensor) -> Tensor:
        first = tensors[0]
        if not first.is_floating_point():
            return first.clone()
        total = first.float() * weights[0]
        for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
            total.add_(tensor.float(), alpha=weight)
        return total.to(first.dtype)

    return map_tensors(added, *outs)
