"""TaylorSeer (Liu et al., arXiv 2503.06923): held branches are extrapolated, not repeated.

Reference formula, of each branch: at a computed step k after p the derivatives are
E0 = f, E(i+1) = (Ei - Di) / (s_k - s_p), D the same at p; at a skipped step s the output is
sum_i Ei (s - s_k)^i / i!. The first steps are computed, then one of every period. As published
the first steps are 2 and s counts steps; here s is the timestep, and both are settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import TenutoError
from .budget import whole_steps
from .interval import LateInterval, late_interval_for
from .policy import Facts
from .schedule import MOST_ORDER, CacheSchedule


@dataclass(frozen=True)
class TaylorSeer:
    """A series of `order`; `first` steps computed, then one of `period`."""

    first: int
    period: int
    order: int = 2

    name: ClassVar[str] = "taylorseer"
    title: ClassVar[str] = "TaylorSeer: first steps, then one of"
    candidate: ClassVar[bool] = False  # three outputs of every branch are kept: by name alone

    def __post_init__(self) -> None:
        if not 1 <= self.order <= MOST_ORDER:
            raise TenutoError(f"A series is of order 1 to {MOST_ORDER}, not {self.order}.")

    def __call__(self, timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """The schedule for these steps and branches."""
        return replace(LateInterval(self.first, self.period)(timesteps, branches), order=self.order)

    @property
    def label(self) -> str:
        """As a search lists it."""
        return f"{self.name} order {self.order} {self.first}/{self.period}"

    @classmethod
    def for_share(
        cls, share: float, facts: Facts, orders: Sequence[int] = (1, 2)
    ) -> list[TaylorSeer]:
        """For both orders, every one that is as near to `share`, in whole steps, as any."""
        whole = whole_steps(share, len(facts.timesteps))
        found = late_interval_for(whole, facts.timesteps, facts.branches)
        return [cls(late.first, late.period, order) for order in orders for late in found]
