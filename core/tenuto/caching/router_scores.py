"""The cells of least score: what a trained router (HarmoniCa, arXiv 2410.01723) reuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import TenutoError
from .policy import Facts
from .schedule import CacheSchedule


@dataclass(frozen=True, eq=False)
class RouterScores:
    """Reuse the cells of least score, as few as make up `reuse` of all by cost.

    logits: (T, N), row 0 is the first executed step. costs: (N,), mean 1; None: all alike.
    spread: how much a cell's distance from the mean of its row counts; near 0, whole steps.
    """

    logits: Tensor
    reuse: float
    costs: Tensor | None = None
    spread: float = 1.0

    name: ClassVar[str] = "router"
    measured: ClassVar[bool] = True

    def __call__(self, timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """The schedule for the steps and branches that were scored."""
        rows, columns = self.logits.shape
        if (rows, columns) != (len(timesteps), len(branches)):
            raise TenutoError(f"The router scores {rows} steps of {columns} branches.")
        costs = torch.ones(columns) if self.costs is None else self.costs
        mean = self.logits[1:].mean(1, keepdim=True)
        scores = torch.lerp(mean, self.logits[1:], self.spread)
        # of equal scores the latest first: early steps are the sensitive ones
        order = (rows - 1) * columns - 1 - scores.reshape(-1).flip(0).argsort(stable=True)
        spent = costs.repeat(rows - 1)[order].double().cumsum(0)
        budget = self.reuse * rows * float(costs.double().sum())
        reused = int((spent < budget - 1e-4).sum()) + (budget > 1e-4)
        table = torch.ones(rows, columns, dtype=torch.bool)
        table[1:].view(-1)[order[:reused]] = False
        return CacheSchedule(table, tuple(timesteps), tuple(branches))

    @classmethod
    def for_share(cls, share: float, facts: Facts) -> list[RouterScores]:
        """One, for `share` as it is; none where nothing was scored."""
        return [] if facts.logits is None else [cls(facts.logits, share)]
