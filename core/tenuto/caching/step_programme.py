"""The step-level programme: which whole steps to reuse, by dynamic programming on measured costs.

The cost of reusing a step is age^power times the measured error of reusing that step alone; age is
the number of steps since the last computed one. Costs are taken to add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import TenutoError
from .budget import whole_steps
from .policy import Facts
from .schedule import CacheSchedule

POWERS = (2.0, 3.0)  # of age: a search measures both
ORDERS = (0, 1)  # of what stands for a reused branch: repeated, or extrapolated


@dataclass(frozen=True)
class StepProgramme:
    """The best schedule of whole steps at `reuse` under measured costs.

    costs: T numbers, the squared error of the result where that step alone is reused
    (`rollout.step_costs`); the first one is ignored. power: how the cost grows with age: 2 where
    errors only grow, 3 where those of one run point the same way too. order: reused branches are
    extrapolated, as in `CacheSchedule`.
    """

    reuse: float
    costs: tuple[float, ...]
    power: float = 3.0
    order: int = 0

    name: ClassVar[str] = "step programme"
    measured: ClassVar[bool] = True

    def __call__(self, timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """The schedule for the steps that the costs were measured at."""
        if len(self.costs) != len(timesteps):
            raise TenutoError(
                f"The costs were measured at {len(self.costs)} steps, not at {len(timesteps)}."
            )
        reused = round(self.reuse * len(timesteps))
        computed = cheapest(self.costs, reused, self.power)
        return CacheSchedule.steps(computed, timesteps, branches, self.order)

    @property
    def label(self) -> str:
        """As the candidates of a search list it."""
        how = ", extrapolated" if self.order else ""
        return f"{self.name} age^{self.power:g}{how}"

    @classmethod
    def for_share(cls, share: float, facts: Facts) -> list[StepProgramme]:
        """One a power and order, for `share` in whole steps; none where no costs were measured."""
        if facts.costs is None:
            return []
        whole = whole_steps(share, len(facts.timesteps))
        return [cls(whole, facts.costs, power, order) for order in ORDERS for power in POWERS]


def cheapest(costs: Sequence[float], reused: int, power: float) -> list[bool]:
    """Which of the steps to compute (True) so that `reused` are reused at the least total cost.

    A run from one computed step s to the next one e costs sum over s < i < e of
    (i - s)^power * costs[i]; the programme chooses the computed steps, the first among them.
    """
    steps = len(costs)
    if not 0 <= reused < max(steps, 1):
        raise TenutoError(f"{steps} steps cannot reuse {reused} of them.")
    best = [[math.inf] * (steps + 1) for _ in range(steps + 1)]  # [computed so far][next computed]
    back = [[0] * (steps + 1) for _ in range(steps + 1)]
    best[0][0] = 0.0
    for chosen in range(1, steps - reused + 1):
        for start in range(steps):
            total = best[chosen - 1][start]
            for end in range(start + 1, steps + 1) if total < math.inf else ():
                if total < best[chosen][end]:
                    best[chosen][end], back[chosen][end] = total, start
                if end < steps:
                    total += (end - start) ** power * costs[end]
    computed, end = [False] * steps, steps
    for chosen in range(steps - reused, 0, -1):
        end = back[chosen][end]
        computed[end] = True
    return computed
