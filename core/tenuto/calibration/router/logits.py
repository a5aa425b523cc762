"""A trained router: its logits, and how a schedule is made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...caching import CacheSchedule


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
        """Hold the cells of least r, as few as make up `reuse` of all by cost.

        spread: how much a cell's distance from the mean of its row counts; near 0, whole steps.
        """
        rows, columns = self.logits.shape
        mean = self.logits[1:].mean(1, keepdim=True)
        order = torch.lerp(mean, self.logits[1:], spread).reshape(-1).argsort(stable=True)
        spent = self.costs.repeat(rows - 1)[order].double().cumsum(0)
        budget = reuse * rows * float(self.costs.double().sum())
        reused = int((spent < budget - 1e-4).sum()) + (budget > 1e-4)
        table = torch.ones(rows, columns, dtype=torch.bool)
        table[1:].view(-1)[order[:reused]] = False
        return CacheSchedule(table, self.timesteps, self.branches)
