"""`CacheSchedule`: the boolean table [steps x branches], and what applies it to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import TenutoError
from ..model import WHOLE
from ..sampling import places_of
from .resample import resampled

MOST_ORDER = 4  # of a series from a branch's last outputs
SHORTEST = 9  # steps of a run below which nothing is reused, unless it was calibrated so


@dataclass(frozen=True, eq=False)
class CacheSchedule:
    """What to compute (True) and what to reuse from before (False).

    table: bool (T, N). timesteps: T, in executed order: the table is keyed by timestep, so that a
    run of other steps gets a table of its own (`at`). branches: N names, of any modules; or the
    whole call alone, `(WHOLE.name,)`. Row 0 always computes. order: what is not computed is the
    last output (0), or a Taylor series from the last `order` + 1 outputs.
    """

    table: Tensor
    timesteps: tuple[float, ...]
    branches: tuple[str, ...]
    order: int = 0

    def __post_init__(self) -> None:
        if self.table.dtype is not torch.bool:
            raise TenutoError("A cache schedule is a boolean table.")
        if tuple(self.table.shape) != (len(self.timesteps), len(self.branches)):
            raise TenutoError(
                f"A schedule of {tuple(self.table.shape)} does not fit {len(self.timesteps)} steps "
                f"and {len(self.branches)} branches."
            )
        if WHOLE.name in self.branches and len(self.branches) > 1:
            raise TenutoError("A cache schedule is of the whole call or of branches, not of both.")
        if not 0 <= self.order <= MOST_ORDER:
            raise TenutoError(f"A series is of order 0 to {MOST_ORDER}, not {self.order}.")
        if not bool(self.table[0].all()):
            raise TenutoError("The first step of a schedule computes every branch.")

    @property
    def reuse_ratio(self) -> float:
        """Share of cells that are reused, over all steps (CUR of HarmoniCa, arXiv 2410.01723)."""
        return 1 - float(self.table.float().mean())

    def at(self, timesteps: Sequence[float], steps: int | None = None) -> CacheSchedule:
        """The same schedule for a run at other timesteps.

        steps: how many the run has, where that is not one a timestep: KDPM2 has two in a step.

        Where they are its own, one by one, it stays. Else each branch reuses the same share of the
        steps, in the same part of the run and no more steps in a row; of fewer than `SHORTEST`
        steps none: too little is left of such a run for errors to fade. whole: how many steps the
        run has, where these are those of one of its denoisers.
        """
        times = tuple(float(t) for t in timesteps)
        if times == self.timesteps:
            return self
        if self.rows(times) == list(range(len(self.timesteps))):
            return replace(self, timesteps=times)
        if (len(times) if steps is None else steps) < SHORTEST or bool(self.table.all()):
            return CacheSchedule.full(times, self.branches)
        table = resampled(self.table, places_of(times, self.timesteps))
        return CacheSchedule(table, times, self.branches, self.order)

    def rows(self, timesteps: Sequence[float]) -> list[int]:
        """The nearest row for each of these timesteps."""
        own = torch.tensor(self.timesteps, dtype=torch.float64)
        gaps = (torch.tensor(timesteps, dtype=torch.float64)[:, None] - own).abs()
        return gaps.argmin(1).tolist()

    def in_steps(self, steps: int) -> CacheSchedule:
        """For a run whose timesteps are not known: its steps lie evenly among the schedule's."""
        places = torch.linspace(0, len(self.timesteps) - 1, steps, dtype=torch.float64).tolist()
        whole = [int(place) for place in places]
        times = (*self.timesteps, self.timesteps[-1])
        even = [
            times[i] + (times[i + 1] - times[i]) * (place - i)
            for place, i in zip(places, whole, strict=True)
        ]
        return self.at(even)

    def over(self, branches: Sequence[str]) -> CacheSchedule:
        """The same with a column for each of `branches`: those that it does not name compute.

        One of the whole call stays so: there is nothing of it that a branch could reuse.
        """
        if self.branches in (tuple(branches), (WHOLE.name,)):
            return self
        table = torch.ones(len(self.timesteps), len(branches), dtype=torch.bool)
        for column, name in enumerate(self.branches):
            table[:, branches.index(name)] = self.table[:, column]
        return CacheSchedule(table, self.timesteps, tuple(branches), self.order)

    def __call__(self, timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """As a policy: the same schedule for these timesteps (`at`), over these branches."""
        return self.over(branches).at(timesteps)

    @staticmethod
    def full(timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """The schedule that computes everything."""
        table = torch.ones(len(timesteps), len(branches), dtype=torch.bool)
        return CacheSchedule(table, tuple(timesteps), tuple(branches))

    @staticmethod
    def steps(
        computed: Sequence[bool],
        timesteps: Sequence[float],
        branches: Sequence[str],
        order: int = 0,
    ) -> CacheSchedule:
        """Whole steps: every branch is computed where `computed[row]`, and reused elsewhere."""
        table = torch.tensor(computed, dtype=torch.bool)[:, None].repeat(1, len(branches))
        return CacheSchedule(table, tuple(timesteps), tuple(branches), order)
