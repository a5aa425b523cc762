"""From a wanted speedup to a share of branch work, and from a schedule to what it saves.

`counts` everywhere: multiply-adds of one denoiser call, "" the whole and each branch by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..errors import TenutoError
from .schedule import CacheSchedule


def reuse_for(speedup: float, counts: Mapping[str, int], steps: int) -> float:
    """The share of branch work to reuse so that a run has `speedup` times fewer multiply-adds.

    What lies outside the branches is always computed, and so is the first step. Multiply-adds are
    not time: what a run gains on a machine is for `compare` to measure.
    """
    inside = sum(count for name, count in counts.items() if name) or counts[""]  # or whole calls
    share = inside / counts[""]
    most = 1 / (1 - share * (1 - 1 / steps))
    if not 1 < speedup <= most:
        raise TenutoError(
            f"Reuse over {steps} steps of this model saves a factor of 1 to {most:.2f} of the "
            f"multiply-adds, not {speedup:g}."
        )
    return (1 - 1 / speedup) / share


def saved(schedule: CacheSchedule, counts: Mapping[str, int]) -> float:
    """The share of a run's multiply-adds that `schedule` reuses."""
    price = torch.tensor([counts[name] for name in schedule.branches], dtype=torch.float64)
    reused = float((~schedule.table).double().sum(0) @ price)
    return reused / (counts[""] * len(schedule.timesteps))


def whole_steps(reuse: float, steps: int) -> float:
    """`reuse` rounded up to whole steps, for schedules that have no finer choice."""
    return min(math.ceil(reuse * steps - 1e-6), steps - 1) / steps
