"""Schedules of whole steps by a fixed rule: interval reuse (FORA) and the late interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..errors import TenutoError
from .budget import whole_steps
from .policy import Facts
from .schedule import CacheSchedule

PERIODS = range(2, 9)  # what the searches try
Policy = TypeVar("Policy", bound=Any)


@dataclass(frozen=True)
class Interval:
    """Interval reuse from the first step (FORA, arXiv 2407.01425).

    Of every `period` steps the first are computed and the last `reused` reused; None is
    period - 1, as in the paper. phase "first" counts from the first executed step: period 2 reuses
    half of all steps. phase "last" is the rule of the released code: the first step is computed,
    and every one whose index from the end is divisible by the period.
    """

    period: int = 2
    reused: int | None = None
    phase: str = "first"

    name: ClassVar[str] = "interval"
    aliases: ClassVar[tuple[str, ...]] = ("uniform",)
    title: ClassVar[str] = "one of"
    candidate: ClassVar[bool] = False  # a late interval that reuses as much is nearer

    def __post_init__(self) -> None:
        reused = self.period - 1 if self.reused is None else self.reused
        if self.period < 1 or not 0 <= reused < max(self.period, 1):
            raise TenutoError(f"An interval of {self.period} steps cannot reuse {reused} of them.")
        if self.phase not in ("first", "last"):
            raise TenutoError(f"Unknown phase {self.phase!r}: 'first' or 'last'.")

    def __call__(self, timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """The schedule for these steps and branches."""
        reused = self.period - 1 if self.reused is None else self.reused
        count = len(timesteps)
        places = range(count) if self.phase == "first" else range(count - 1, -1, -1)
        computed = [place % self.period < self.period - reused for place in places]
        return CacheSchedule.steps([True, *computed[1:]], timesteps, branches)

    @classmethod
    def for_share(cls, share: float, facts: Facts) -> list[Interval]:
        """Every interval that is as near to `share`, in whole steps, as any."""
        return interval_for(whole_steps(share, len(facts.timesteps)), *_grid(facts))


@dataclass(frozen=True)
class LateInterval:
    """The first `first` steps are computed, and from there on one of every `period`.

    Early steps are the sensitive ones: with as many reuses, this is far closer than an interval
    from the first step on.
    """

    first: int
    period: int

    name: ClassVar[str] = "late interval"
    title: ClassVar[str] = "first steps, then one of"

    def __post_init__(self) -> None:
        if self.first < 0 or self.period < 1:
            raise TenutoError(f"No late interval has first {self.first} and period {self.period}.")

    def __call__(self, timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """The schedule for these steps and branches."""
        rows = range(len(timesteps))
        computed = [i < self.first or (i - self.first) % self.period == 0 for i in rows]
        return CacheSchedule.steps([True, *computed[1:]], timesteps, branches)

    @property
    def label(self) -> str:
        """As the candidates of a search list it."""
        return f"{self.name} {self.first}/{self.period}"

    @classmethod
    def for_share(cls, share: float, facts: Facts) -> list[LateInterval]:
        """Every late interval that is as near to `share`, in whole steps, as any."""
        return late_interval_for(whole_steps(share, len(facts.timesteps)), *_grid(facts))


def _grid(facts: Facts) -> tuple[tuple[float, ...], tuple[str, ...]]:
    return facts.timesteps, facts.branches


def late_interval_for(
    reuse: float, timesteps: Sequence[float], branches: Sequence[str]
) -> list[LateInterval]:
    """Every late interval whose reuse ratio is as near to `reuse` as any; measure to choose."""
    rows = range(len(timesteps))
    found = (LateInterval(first, period) for period in PERIODS for first in rows)
    return nearest(reuse, found, timesteps, branches)


def interval_for(
    reuse: float, timesteps: Sequence[float], branches: Sequence[str]
) -> list[Interval]:
    """Every interval from the first step on whose reuse ratio is as near to `reuse` as any."""
    found = (
        Interval(period, reused, phase)
        for period in PERIODS
        for reused in range(1, period)
        for phase in ("first", "last")
    )
    return nearest(reuse, found, timesteps, branches)


def nearest(
    reuse: float, policies: Iterable[Policy], timesteps: Sequence[float], branches: Sequence[str]
) -> list[Policy]:
    """Those policies whose reuse ratio is nearest to `reuse`; of equal tables only the first."""
    gaps: dict[tuple[bool, ...], tuple[int, Policy]] = {}
    wanted = round(reuse * len(timesteps))
    for policy in policies:
        rows = tuple(policy(timesteps, branches[:1]).table[:, 0].tolist())
        gaps.setdefault(rows, (abs(rows.count(False) - wanted), policy))
    least = min((gap for gap, _ in gaps.values()), default=0)
    return [policy for gap, policy in gaps.values() if gap == least]
