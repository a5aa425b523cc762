"""A feature cache in a MODEL: branches reused from step to step, and what the last run did."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tenuto.caching import CachedBranch, for_branch
from tenuto.errors import ModelError
from tenuto.model import WHOLE, Override, describe, key_map_of, override_
from tenuto.runtime import Policy
from tenuto.sampling import Clock

from .wrapping import Wrapped


@dataclass
class Run:
    """One sampling run. computed, reused: how often each cell was, int (T, N).

    cells: by the host's names of what the run's table has columns of; names: the canonical ones.
    """

    clock: Clock
    cells: dict[str, CachedBranch]
    names: tuple[str, ...]
    computed: Tensor
    reused: Tensor
    seconds: list[float]
    calls: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the rows."""
        return self.clock.timesteps


class Cache(Wrapped):
    """Reuses branches by a policy: policy(timesteps, branches) says what to compute in a run.

    branches: the host's names. last: the last run that ended, for a report.
    """

    key = "tenuto_cache"

    def __init__(self, model: Any, policy: Policy) -> None:
        super().__init__()
        denoiser = model.model.diffusion_model
        keys = key_map_of(denoiser)
        if keys is None:  # what its parts hand out is not known to be theirs alone
            raise ModelError(f"Tenuto cannot cache a {type(denoiser).__name__} yet.")
        self.branches = tuple(b.name for b in describe(denoiser).branches)
        self.keys, self.denoiser = keys, weakref.ref(denoiser)
        self.policy = policy
        self.run: Run | None = None
        self.last: Run | None = None

    def opened(self, times: Sequence[float]) -> Callable[[], None]:
        """A table for the timesteps of this run; a run inside another has its own."""
        before = self.run
        self.run = self._run(times) if times else None

        def close() -> None:
            self.last, self.run = self.run or self.last, before
            if self.last is not None:
                self.last.cells = {}  # what was stored goes with the run

        return close

    def _run(self, times: Sequence[float]) -> Run:
        schedule = self.policy(times, self.branches)
        clock = Clock(schedule.timesteps)
        names, rows, model = schedule.branches, schedule.table.t().tolist(), self.denoiser()
        assert model is not None  # it is running
        cells = {
            name: for_branch(CachedBranch(clock, computed, order=schedule.order), name, model)
            for name, computed in zip(names, rows, strict=True)
        }
        count = torch.zeros(schedule.table.shape, dtype=torch.int64)
        seconds = [0.0] * len(schedule.timesteps)
        named = tuple(map(self.keys.canonical, names))
        return Run(clock, cells, named, count, count.clone(), seconds)

    def overrides(self, patcher: Any, denoiser: nn.Module) -> list[Override]:
        """One a branch, and one for the whole call."""
        return [
            override_(denoiser.get_submodule(name), BranchCall(self, name))
            for name in (*self.branches, WHOLE.name)
        ]

    def observe(self, times: Tensor, batch: int, options: dict[str, Any], device: Any) -> None:
        """The clock is the run's own."""
        if self.run is not None:
            self.clock = self.run.clock
            super().observe(times, batch, options, device)

    def calling(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As for every patch; the run counts it."""
        run, start = self.run, time.perf_counter()
        try:
            return super().calling(executor, x, t, *args, **kwargs)
        finally:
            if run is not None:
                run.calls += 1
                run.seconds[run.clock.step] += time.perf_counter() - start


class BranchCall:
    """The forward of one branch: under the run's table inside a call of ours, else its own."""

    def __init__(self, owner: Cache, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.owner.run
        cell = run.cells.get(self.name) if run is not None and self.owner.on else None
        if run is None or cell is None:
            return original(*args, **kwargs)
        before = cell.counts[1]
        out = cell(original, module, *args, **kwargs)
        count = run.reused if cell.counts[1] > before else run.computed
        count[run.clock.step, list(run.cells).index(self.name)] += 1
        return out
