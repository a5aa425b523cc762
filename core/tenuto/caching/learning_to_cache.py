"""Learning-to-Cache (Ma et al., arXiv 2406.01733): trained gates of every second step's branches.

Reference formula: with r = sigmoid(gate), a branch of a step after a full one mixes
r f + (1 - r) c, c from that full step; the loss is the squared difference to the full output plus
beta * sum r, on inputs of the model's own full run. A branch is computed where r > theta; every
other step is computed in full, so that no more than half of all cells are reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import TenutoError
from .policy import Facts
from .router_scores import RouterScores
from .schedule import CacheSchedule


@dataclass(frozen=True, eq=False)
class LearningToCache:
    """The table of `gates`, logits (T, N), at the threshold `theta` or at the share `reuse`.

    Rows 0, 2, 4, ... are full. With `reuse` theta is the one that reuses that share of all cells.
    """

    gates: Tensor
    theta: float = 0.1
    reuse: float | None = None

    name: ClassVar[str] = "learning-to-cache"
    candidate: ClassVar[bool] = False  # it is trained by itself

    def __call__(self, timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """The schedule for the steps and branches that were trained."""
        gates = self.gates.clone()
        if tuple(gates.shape) != (len(timesteps), len(branches)):
            raise TenutoError("The gates are of {} steps and {} branches.".format(*gates.shape))
        gates[::2] = torch.inf
        if self.reuse is None:
            table = torch.sigmoid(gates) > self.theta
            return CacheSchedule(table, tuple(timesteps), tuple(branches))
        most = (len(gates) // 2) / len(gates)
        if self.reuse > most + 1e-6:
            raise TenutoError(f"Learning-to-Cache reuses at most {most:.0%} of {len(gates)} steps.")
        return RouterScores(gates, self.reuse)(timesteps, branches)

    @classmethod
    def for_share(cls, share: float, facts: Facts) -> list[LearningToCache]:
        """One, where gates were trained (`Facts.logits`) and `share` is no more than half."""
        most = len(facts.timesteps) // 2 / len(facts.timesteps)
        if facts.logits is None or share > most + 1e-6:
            return []
        return [cls(facts.logits, reuse=share)]
