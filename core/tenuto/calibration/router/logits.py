"""A trained router: its logits, and how a schedule is made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...caching import CacheSchedule, RouterScores


@dataclass(frozen=True, eq=False)
class Router:
    """A trained router. logits (T, N), row 0 is the first executed step; costs (N,), mean 1."""

    logits: Tensor
    timesteps: tuple[float, ...]
    branches: tuple[str, ...]
    costs: Tensor
    beta: float
    history: tuple[dict[str, float], ...] = ()

    def threshold(self, tau: float) -> CacheSchedule:
        """Compute where r > tau: what the paper does."""
        table = torch.sigmoid(self.logits) > tau
        table[0] = True
        return CacheSchedule(table, self.timesteps, self.branches)

    def cut(self, reuse: float, spread: float = 1.0) -> CacheSchedule:
        """Reuse the cells of least r, as few as make up `reuse` of all by cost."""
        scores = RouterScores(self.logits, reuse, self.costs, spread)
        return scores(self.timesteps, self.branches)
