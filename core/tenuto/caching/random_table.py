"""Random schedules: the control that shows whether a choice of cells is worth anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import TenutoError
from .policy import Facts
from .schedule import CacheSchedule


@dataclass(frozen=True)
class RandomTable:
    """A share `reuse` of all cells, chosen by `seed` evenly from every row but the first."""

    reuse: float
    seed: int = 0

    name: ClassVar[str] = "random"
    candidate: ClassVar[bool] = False

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

    @classmethod
    def for_share(cls, share: float, facts: Facts) -> list[RandomTable]:
        """One of them, by seed 0."""
        return [cls(share)]
