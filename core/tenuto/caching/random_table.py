"""Random schedules: the control that shows whether a choice of cells is worth anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import TenutoError
from .schedule import CacheSchedule


@dataclass(frozen=True)
class RandomTable:
    """`reuse` of all cells are held, drawn evenly from every row but the first, by `seed`."""

    reuse: float
    seed: int = 0

    def __call__(self, timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """The schedule for these steps and branches."""
        rows, columns = len(timesteps), len(branches)
        free = max(rows - 1, 0) * columns
        count = round(self.reuse * rows * columns)
        if not 0 <= count <= free:
            raise TenutoError(f"{rows} steps cannot reuse {self.reuse:.0%} of their branches.")
        order = torch.randperm(free, generator=torch.Generator().manual_seed(self.seed))
        table = torch.ones(rows, columns, dtype=torch.bool)
        table[1:].view(-1)[order[:count]] = False
        return CacheSchedule(table, tuple(timesteps), tuple(branches))
