"""A cache in a MODEL: branches reused, or whole calls forecast, and what the last run did."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tenuto.caching import (
    CachedBranch,
    CacheSchedule,
    Forecast,
    ForecastCalls,
    for_branch,
    forecast_run,
    said_of,
    why_none,
)
from tenuto.errors import ModelError
from tenuto.model import WHOLE, Override, describe, names_in_host, override_
from tenuto.runtime import Policy, host_kernel
from tenuto.sampling import Clock, adds_noise

from .own_formats import passed_by
from .wrapping import Wrapped

log = logging.getLogger("tenuto")


@dataclass
class Run:
    """One sampling run. computed, reused: how often each cell was, int (T, N).

    cells: by the host's names of what the run's table has columns of; names: the canonical ones.
    forecast: whether the one cell of a step is the whole call, which a forecast stands in for;
    why: a sentence that says why it skips none; said: one on what skipping is likely to cost.
    """

    clock: Clock
    cells: dict[str, CachedBranch | ForecastCalls]
    names: tuple[str, ...]
    computed: Tensor
    reused: Tensor
    seconds: list[float]
    forecast: bool = False
    why: str = ""
    said: str = ""
    calls: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the rows."""
        return self.clock.timesteps


class Cache(Wrapped):
    """Reuses branches by a policy: policy(timesteps, branches) says what to compute in a run.

    Or it skips whole calls, by a forecast: of that a model needs no branches. branches: the host's
    names. blocks: of branches that the host may pass by, the block that is reused in their place.
    last: the last run that ended, for a report.
    """

    key = "tenuto_cache"

    def __init__(self, model: Any, plan: Policy | Forecast) -> None:
        super().__init__()
        denoiser = model.model.diffusion_model
        self.plan, self.denoiser = plan, weakref.ref(denoiser)
        self.keys, self.branches = names_in_host(denoiser), ()
        self.blocks: dict[str, str] = {}
        if not isinstance(plan, Forecast):
            if self.keys is None:  # its parts may return tensors that others write to
                raise ModelError(f"Tenuto cannot cache a {type(denoiser).__name__} yet.")
            backbone = describe(denoiser)
            whole = passed_by(denoiser, backbone)
            self.branches = tuple(b.name for b in backbone.branches)
            self.blocks = {b.name: b.block for b in backbone.branches if b.block in whole}
        self.run: Run | None = None
        self.last: Run | None = None

    def opened(self, times: Sequence[float], sampler: Any, guider: Any) -> Callable[[], None]:
        """A table for the timesteps of this run; a run inside another has its own."""
        before = self.run
        self.run = self._run(times, sampler, guider) if times else None

        def close() -> None:
            self.last, self.run = self.run or self.last, before
            if self.last is not None:
                for cell in self.last.cells.values():
                    if isinstance(cell, ForecastCalls) and cell.counts[0]:
                        self.last.why = self.last.why or why_none(cell)
                        self.last.said = said_of(cell)
                self.last.cells = {}  # what was stored goes with the run

        return close

    def _run(self, times: Sequence[float], sampler: Any, guider: Any) -> Run:
        model = self.denoiser()
        assert model is not None  # it is running
        if isinstance(self.plan, Forecast):
            noisy, guidance = is_stochastic(sampler), getattr(guider, "cfg", None)
            plan = self.plan
            if plan.origin:  # a node after this one may have changed the model's sampling
                sampling = guider.model_patcher.get_model_object("model_sampling")
                plan = replace(plan, kernel=host_kernel(sampling))
            calls, why = forecast_run(plan, times, model, noisy, guidance)
            if why:
                log.info("Tenuto: %s", why)
            return _new(calls.clock, {WHOLE.name: calls}, (WHOLE.name,), forecast=True, why=why)
        schedule, keys = in_blocks(self.plan(times, self.branches), self.blocks), self.keys
        assert keys is not None
        clock, rows = Clock(schedule.timesteps), schedule.table.t().tolist()
        cells = {
            name: for_branch(CachedBranch(clock, computed, order=schedule.order), name, model)
            for name, computed in zip(schedule.branches, rows, strict=True)
        }
        return _new(clock, cells, tuple(map(keys.canonical, schedule.branches)))

    def overrides(self, patcher: Any, denoiser: nn.Module) -> list[Override]:
        """One a branch, and one for the whole call."""
        names = dict.fromkeys(self.blocks.get(name, name) for name in self.branches)
        return [
            override_(denoiser.get_submodule(name), BranchCall(self, name))
            for name in (*names, WHOLE.name)
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


def _new(clock: Clock, cells: Any, names: tuple[str, ...], **facts: Any) -> Run:
    """A run of which nothing is counted yet."""
    count = torch.zeros(len(clock.timesteps), len(names), dtype=torch.int64)
    seconds = [0.0] * len(clock.timesteps)
    return Run(clock, cells, names, count, count.clone(), seconds, **facts)


def in_blocks(schedule: CacheSchedule, blocks: Mapping[str, str]) -> CacheSchedule:
    """With one column for the branches of a block in `blocks`: it computes where any of them does.

    blocks: branch -> the block that is reused as a whole.
    """
    names = [blocks.get(name, name) for name in schedule.branches]
    if names == list(schedule.branches):
        return schedule
    merged = tuple(dict.fromkeys(names))
    columns = [[i for i, name in enumerate(names) if name == one] for one in merged]
    table = torch.stack([schedule.table[:, some].any(1) for some in columns], 1)
    return replace(schedule, table=table, branches=merged)


def is_stochastic(sampler: Any) -> bool:
    """Whether a SAMPLER adds noise of its own at every step."""
    function = getattr(sampler, "sampler_function", type(sampler))
    return adds_noise(function, getattr(sampler, "extra_options", None) or {})


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
