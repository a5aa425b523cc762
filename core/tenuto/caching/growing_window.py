"""The growing window: the first steps are computed, then one after ever longer stretches.

The window of Spectrum's code, which forecasts with it: early steps are the sensitive ones.
Reference formula: window w = start; after each computed step skip floor(w) steps, then
w <- w + growth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import TenutoError
from .budget import whole_steps
from .interval import nearest
from .policy import Facts
from .schedule import CacheSchedule

STARTS, GROWTHS = (0.0, 0.5, 1.0, 2.0), (0.125, 0.25, 0.5, 0.75, 1.0, 1.5)  # what a search tries


@dataclass(frozen=True)
class GrowingWindow:
    """`first` steps computed, then windows of `start`, `start + growth`, ... skipped steps.

    order: what is not computed is extrapolated, as in `CacheSchedule`.
    """

    first: int
    start: float
    growth: float
    order: int = 0

    name: ClassVar[str] = "growing window"
    candidate: ClassVar[bool] = False  # the programme finds such tables by itself

    def __post_init__(self) -> None:
        if self.first < 1 or self.start < 0 or self.growth < 0 or self.start + self.growth == 0:
            raise TenutoError("A growing window computes a first step and grows from 0 or more.")

    def __call__(self, timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """The schedule for these steps and branches."""
        computed, window = [True] * min(self.first, len(timesteps)), self.start
        while len(computed) < len(timesteps):
            computed += [False] * int(window + 1e-9) + [True]
            window += self.growth
        computed = computed[: len(timesteps)]
        return CacheSchedule.steps(computed, timesteps, branches, self.order)

    @property
    def label(self) -> str:
        """As a search lists it."""
        return f"{self.name} {self.first}/{self.start:g}+{self.growth:g}"

    @classmethod
    def for_share(cls, share: float, facts: Facts, order: int = 0) -> list[GrowingWindow]:
        """Every one that is as near to `share`, in whole steps, as any."""
        found = (
            cls(first, start, growth, order)
            for first in range(1, len(facts.timesteps))
            for start in STARTS
            for growth in GROWTHS
        )
        whole = whole_steps(share, len(facts.timesteps))
        return nearest(whole, found, facts.timesteps, facts.branches)
