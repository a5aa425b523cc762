"""`Samples`: whether a noisy sample goes on with the run in progress or is that of another one.

For denoiser calls of which nothing but the arguments is known. Where it cannot be told, it is
another run: too much is computed then, and no features of another image are used.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model import Rows

VALUES = 64  # of a sample, to tell how alike two are
LIKE = 0.5  # the least correlation of two samples of one run, over one large step or none


@dataclass(frozen=True)
class Seen:
    """The last sample of a stream.

    time, row: its timestep and which step of the run that is. mark: a hash of it. values: some of
    it, fp32 (n,).
    place: timesteps of the run before this one. twice: whether the timestep was called more than
    once; paired: whether every timestep between the first and this one was.
    doubt: whether the run may be two that take turns.
    """

    time: float
    row: int
    mark: int
    values: Tensor
    place: int = 0
    twice: bool = False
    paired: bool = True
    doubt: bool = False


class Samples:
    """The last sample of every stream of one run.

    near: timesteps no further apart are one and the same, of schedules with two near ones a step.
    """

    def __init__(self, near: float = 0.0) -> None:
        self.seen: dict[Hashable, Seen] = {}
        self.doubt, self.near = False, near

    def clear(self) -> None:
        """A run begins."""
        self.seen, self.doubt = {}, False

    def go_on(self, streams: Sequence[Hashable], found: Sequence[Seen]) -> bool:
        """Whether the samples `found`, one a stream, go on with this run; they are remembered.

        If they don't, call `clear` and `restart` with them.
        """
        after = [self._after(self.seen.get(s), new) for s, new in zip(streams, found, strict=True)]
        kept = [new for new in after if new is not None]
        if len(kept) < len(after):
            return False
        self.seen.update(zip(streams, kept, strict=True))
        return True

    def restart(self, streams: Sequence[Hashable], found: Sequence[Seen]) -> None:
        """The samples are the first ones of a run that may be several, call by call in turn."""
        self.doubt = True
        self.seen = {s: replace(new, doubt=True) for s, new in zip(streams, found, strict=True)}

    def _after(self, old: Seen | None, new: Seen) -> Seen | None:
        """`new` with what `old` says of its run; None where it is of another."""
        if old is None:
            return replace(new, doubt=self.doubt)
        if same_step(new.time, old.time) or abs(new.time - old.time) <= self.near:
            return self._again(old, new)
        alike = correlated(old.values, new.values)
        if not alike and (old.doubt or new.row > old.row + 1):
            return None
        paired = old.paired and (old.place == 0 or old.twice)
        return replace(new, place=old.place + 1, paired=paired)

    def _again(self, old: Seen, new: Seen) -> Seen | None:
        """Another call at the same timestep.

        Guidance in two calls, or any other pass, has the same sample. Heun's method has another:
        twice at every timestep but the first, much like the one before. So has KDPM2 ancestral, at
        a timestep that is nearly the same. Anything else is a new run.
        """
        if new.mark == old.mark:
            return replace(old, twice=True)  # Heun's too, where both evaluations were reused
        second_order = old.place > 0 and (self.near > 0 or (old.paired and not old.twice))
        if second_order and correlated(old.values, new.values):
            return replace(old, mark=new.mark, values=new.values, twice=True)
        return None


def same_step(one: float, other: float) -> bool:
    """Whether two timesteps are equal, but for rounding."""
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other))


def correlated(one: Tensor, other: Tensor) -> bool:
    """Whether the correlation of two rows of values is at least `LIKE`."""
    if one.shape != other.shape:
        return False
    a, b = (x.double() - x.double().mean() for x in (one, other))
    return float(a @ b) >= LIKE * float(a.norm() * b.norm()) > 0


def some_values(sample: Rows) -> Tensor:
    """The bits of a few values of each row of `sample` (B, ...), as fp32: int64 (B, n)."""
    if not isinstance(sample, Tensor):
        found = [some_values(x.detach()[None]) for x in sample]
        least = min(x.shape[1] for x in found)
        return torch.cat([x[:, :least] for x in found])
    rows = sample.detach().reshape(sample.shape[0], -1)
    count = rows.shape[1]
    places = torch.arange(min(VALUES, count), device=rows.device) * 0x9E3779B1 % max(count, 1)
    return rows[:, places].to(torch.float32).view(torch.int32).to(torch.int64)


def values_of(bits: Sequence[int]) -> Tensor:
    """The values of one row, from what `some_values` says of it: fp32 (n,)."""
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def numbered(marks: Sequence[int]) -> list[tuple[int, int]]:
    """(mark, how many equal ones came before) for each mark."""
    seen: dict[int, int] = {}
    streams: list[tuple[int, int]] = []
    for mark in marks:
        seen[mark] = seen.get(mark, -1) + 1
        streams.append((mark, seen[mark]))
    return streams
