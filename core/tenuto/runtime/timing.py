"""Latencies of functions that are run in turn, so that each meets the same load."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) by linear interpolation; infinities are allowed."""
    ordered = sorted(values)
    place = q / 100 * (len(ordered) - 1)
    low = math.floor(place)
    lower, upper = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    return lower if place == low or lower == upper else lower + (place - low) * (upper - lower)


@dataclass(frozen=True)
class Latency:
    """Seconds of repeated runs, in the order in which they were made."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The 25th and the 75th percentile."""
        return percentile(self.seconds, 25), percentile(self.seconds, 75)

    def over(self, other: Latency) -> Latency:
        """Run by run, how many times as long as `other`: ratios of runs made side by side."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return Latency(tuple(mine / theirs for mine, theirs in pairs))


def latency(
    fns: dict[str, Callable[[], Any]], repeats: int = 7, warmup: int = 1
) -> dict[str, Latency]:
    """Seconds of each function: they are run in turn `repeats` times, every other time backwards.

    Load from elsewhere and a sinking clock then meet all of them alike. `warmup` runs don't count.
    """
    for fn in fns.values():
        for _ in range(warmup):
            fn()
    found: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(repeats):
        for name in list(fns)[:: -1 if turn % 2 else 1]:
            found[name].append(timed(fns[name])[1])
    return {name: Latency(tuple(seconds)) for name, seconds in found.items()}


def timed(fn: Callable[[], Any]) -> tuple[Any, float]:
    """What `fn` returns and its seconds, with the work it gave to CUDA done."""
    _synchronize()
    start = time.perf_counter()
    result = fn()
    _synchronize()
    return result, time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
