"""How long an evaluation takes with Tenuto and without: measured in this session, or left out."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Any


class Timing:
    """Times the evaluations of the sampler in progress. full: key -> seconds without Tenuto."""

    def __init__(self) -> None:
        self.full: dict[Hashable, float] = {}
        self.key: Hashable = None
        self.starts: list[float] = []

    def begin(self) -> None:
        """Another sampling run begins."""
        self.key, self.starts = None, []

    def note(self, params: Any, model: Any) -> None:
        """An evaluation begins. params: what the host's callback gets."""
        sampler = getattr(params.denoiser, "sampler", None)
        name = getattr(getattr(sampler, "config", None), "name", type(sampler).__name__)
        self.key = (id(model), tuple(params.x.shape), params.total_sampling_steps, name)
        self.starts.append(time.perf_counter())

    def seconds(self) -> float | None:
        """Mean time from one evaluation to the next, less the first, which may prepare things."""
        if len(self.starts) < 4:
            return None
        return (self.starts[-1] - self.starts[1]) / (len(self.starts) - 2)

    def keep_full(self) -> None:
        """The run that ends was one without Tenuto."""
        seconds = self.seconds()
        if seconds is not None:
            self.full[self.key] = seconds

    def speedup(self) -> float | None:
        """How many times as fast as the last full run of the same settings; None if not timed."""
        mine, full = self.seconds(), self.full.get(self.key)
        return None if mine is None or full is None else full / mine
