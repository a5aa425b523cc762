"""Which whole calls of a run to skip, and what stands for their outputs: planned from a kernel.

A skipped call is forecast from the last computed ones,

    output_t = sum_i w[t, i] * output_(tap i),    at most `TAPS` taps, the newest first.

The exact dynamic programme over computed steps finds the table; its cost is the squared error of
the final sample / alpha, errors of one stretch of skipped calls added up as vectors: they point the
same way. It counts on three taps, of which there are few enough combinations, so that the error
that it predicts is rather too large. The weights of all taps then make up for the drift that
earlier forecasts left.

Where outputs are of a quantized model, each has an error of its own, as if those of two steps had
nothing in common: a large weight costs. The weights are those of the least error in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import TenutoError
from ..sampling import OutputKernel
from .forecast_budget import AT_ONE, Speedup, about_db, calls_for, check_speedup, tell
from .schedule import SHORTEST
from .stretch_costs import stretch_costs

TAPS = 5  # computed outputs that a forecast combines: from three on 3 to 7 dB, beyond five nothing
RIDGE = 1e-6  # of the mean of the kernel's diagonal, toward linear extrapolation: of three taps
RIDGE_OF_ALL = 1e-5  # and of all
FADING = 0.85  # of the drift over a computed step, in a run of 20
LONGEST = 12  # calls skipped in a row, at most, in runs of more than 24 steps
EXACT = 24
RANK = 64  # of a kernel: what is left beyond is rounding
MOST = 200  # steps of a run above which nothing is skipped, as below `SHORTEST`


@dataclass(frozen=True, eq=False)
class Forecast:
    """How many calls to skip in any run, by what a kernel knows of the outputs.

    speedup: calls of the run over calls that are computed, from 1 on; "auto": as many as can be
    skipped with a predicted error of at most `SAFE`. Nothing is skipped in runs of fewer than
    `SHORTEST` steps and where the sampler adds noise of its own at every step. at_one: dB of an
    error of 1, as measured for the model.
    """

    kernel: OutputKernel
    speedup: Speedup
    at_one: float = AT_ONE

    def __post_init__(self) -> None:
        check_speedup(self.speedup, MOST)

    @property
    def origin(self) -> str:
        """Where the kernel comes from, if it is not of the model; else ""."""
        return getattr(self.kernel, "origin", "")

    def db(self, plan: ForecastPlan) -> float:
        """About which PSNR in dB to the full run is predicted for one of its plans."""
        return about_db(plan.error, self.at_one)

    def plan(
        self,
        timesteps: Sequence[float],
        stochastic: bool = False,
        per_step: float = 1.0,
        guidance: float | None = None,
    ) -> ForecastPlan:
        """The plan for a run at these timesteps. per_step: how many of them a step has.

        guidance: of the run, in u + guidance * (c - u); None: as recorded.
        """
        times = tuple(float(t) for t in timesteps)
        fits = len(times) / per_step >= SHORTEST and len(times) <= MOST
        if stochastic or self.speedup == 1 or not fits:
            return ForecastPlan.full(times)
        kernel = self.kernel.guided(guidance)
        key = kernel.mark, self.speedup, times
        if key not in PLANS:
            if len(PLANS) >= KEPT:
                old = next(iter(PLANS))
                PLANS.pop(old)
                TOLD.discard(old)
            TOLD.discard(key)
            programme = Programme(kernel.at(times))
            PLANS[key] = programme.plan(calls_for(programme.errors, len(times), self.speedup))
        plan = PLANS[key]
        if key not in TOLD and tell(plan.calls, len(times), self.db(plan), bool(self.origin)):
            TOLD.add(key)
        return plan


def speedup_of(kernel: OutputKernel, speedup: Speedup) -> float:
    """A speedup as a number: of the recorded steps' own plan where it is "auto"."""
    check_speedup(speedup, MOST)
    if isinstance(speedup, str):
        plan = Forecast(kernel, speedup).plan(kernel.timesteps)
        return math.floor(1e4 * len(plan.timesteps) / max(1, plan.calls)) / 1e4  # never a call less
    return float(speedup)


@dataclass(frozen=True)
class ForecastPlan:
    """Of one run: `computed[t]`, and for a skipped call its taps (rows) and their weights."""

    timesteps: tuple[float, ...]
    computed: tuple[bool, ...]
    taps: tuple[tuple[int, ...], ...]  # newest first; () where the call is computed
    weights: tuple[tuple[float, ...], ...]
    error: float = 0.0  # predicted mean squared error of the final sample / alpha

    @property
    def calls(self) -> int:
        """How many calls are computed."""
        return sum(self.computed)

    @staticmethod
    def full(timesteps: Sequence[float]) -> ForecastPlan:
        """Every call is computed."""
        count = len(timesteps)
        return ForecastPlan(tuple(timesteps), (True,) * count, ((),) * count, ((),) * count)

    def after(self, timesteps: Sequence[float]) -> ForecastPlan:
        """The same after steps at `timesteps`, which are computed and forecast nothing."""
        if not timesteps:
            return self
        first = ForecastPlan.full(timesteps)
        taps = tuple(tuple(tap + len(timesteps) for tap in taps) for taps in self.taps)
        return ForecastPlan(
            first.timesteps + self.timesteps, first.computed + self.computed, first.taps + taps,
            first.weights + self.weights, self.error,
        )  # fmt: skip


TOLD: set[Any] = set()  # the keys in PLANS whose warning has had its time
PLANS: dict[Any, ForecastPlan] = {}  # made in this process, oldest first; no more than KEPT
KEPT = 32


class Programme:
    """Every plan for the steps of one kernel: the best table for each number of calls."""

    def __init__(self, kernel: OutputKernel) -> None:
        self.kernel, self.steps = kernel, len(kernel.timesteps)
        self.gains = kernel.gains()
        self.span = self.steps if self.steps <= EXACT else LONGEST + 1
        found, vectors = torch.linalg.eigh(kernel.values)
        kept = (found > found.amax().clamp_min(0) * 1e-13).nonzero().flatten()[-RANK:]
        self.outputs = vectors[:, kept] * found[kept].sqrt()  # (T, R): K = outputs @ outputs.T
        self.ridge = RIDGE * float(kernel.values.diagonal().mean())
        self.times = torch.tensor(kernel.timesteps, dtype=torch.float64)
        self.right = self.given = self.outputs
        if kernel.rounding:  # (T, R + T): beside what an output is to be, what rounding adds to it
            added = torch.tensor(kernel.rounding, dtype=torch.float64).sqrt().diag()
            self.given = torch.cat([self.outputs, added], dim=1)
            self.right = torch.cat([self.outputs, torch.zeros_like(added)], dim=1)

    @cached_property
    def errors(self) -> dict[int, float]:
        """The predicted error for every number of calls, from 2 on, that there is a plan for."""
        return {calls: float(cost) for calls, (cost, _) in self._best.items()}

    def plan(self, calls: int) -> ForecastPlan:
        """The plan that computes `calls` steps; TenutoError if there is none so short."""
        if calls >= self.steps:
            return ForecastPlan.full(self.kernel.timesteps)
        if calls not in self._best:
            least = min(self._best, default=self.steps)
            raise TenutoError(
                f"A forecast of {self.steps} steps computes at least {least} of them, not {calls}."
            )
        computed = self._table(calls)
        taps, weights = self._weights(computed)
        return ForecastPlan(
            self.kernel.timesteps, tuple(computed), taps, weights, self.errors[calls]
        )

    # --- the table ----------------------------------------------------------------------------

    def _states(self) -> Tensor:
        """Every (newest, before it, before that) of computed steps, -1 for none: int64 (S, 3)."""
        newest = torch.arange(1, self.steps)
        gaps = torch.arange(1, self.span)
        p0, g1, g2 = torch.meshgrid(newest, gaps, torch.arange(0, self.span), indexing="ij")
        p1, p2 = p0 - g1, p0 - g1 - g2
        # without a third tap (gap 0) only at the start, where the first two steps are computed
        there = torch.where(g2 == 0, (p0 == 1) & (p1 == 0), (p1 > 0) & (p2 >= 0))
        p2 = torch.where(g2 == 0, -torch.ones_like(p2), p2)
        return torch.stack([p0, p1, p2], dim=-1)[there]

    @cached_property
    def _costs(self) -> tuple[Tensor, Tensor]:
        """(costs (S, span), end (S,)): of skipping the next j calls after a state, and the rest.

        costs[:, j - 1]: the next computed step is j after the newest; infinite past the end.
        """
        states = self._states()
        p0 = states[:, 0]
        last = (p0[:, None] + torch.arange(self.span)).clamp_max(self.steps - 1)
        known = self.outputs, self.gains, self.times, self.ridge
        costs = stretch_costs(*known, states, last)
        left = self.steps - 1 - p0  # calls after the newest
        end = torch.where(
            left < self.span,
            costs.gather(1, left.clamp_max(self.span - 1)[:, None])[:, 0],
            torch.full((), math.inf, dtype=torch.float64),
        )
        jumps = torch.arange(1, self.span + 1)
        return costs.masked_fill(p0[:, None] + jumps >= self.steps, math.inf), end

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """`_costs` by (newest, gap before it, gap before that): (T, span, span, span), and end."""
        states, (costs, end) = self._states(), self._costs
        gap2 = torch.where(states[:, 2] < 0, 0, states[:, 1] - states[:, 2])
        place = states[:, 0], states[:, 0] - states[:, 1], gap2
        shape = (self.steps, self.span, self.span)
        full_costs = torch.full((*shape, self.span), math.inf, dtype=torch.float64)
        full_end = torch.full(shape, math.inf, dtype=torch.float64)
        full_costs[place], full_end[place] = costs, end
        return full_costs, full_end

    @cached_property
    def _best(self) -> dict[int, tuple[float, list[Tensor]]]:
        """For each number of calls: the least cost, and the least of each state on the way.

        Those are (T, span, span), like `_tables`: of 2 computed calls, of 3, ...
        """
        if self.steps < 3:
            return {}
        costs, end = self._tables
        span, count = self.span, self.steps
        best = torch.full((count, span, span), math.inf, dtype=torch.float64)
        best[1, 1, 0] = 0.0
        found: dict[int, tuple[float, list[Tensor]]] = {}
        trail: list[Tensor] = []
        for calls in range(2, count + 1):
            trail.append(best)
            least = float((best + end).amin())
            if math.isfinite(least):
                found[calls] = least, list(trail)
            values = (best[..., None] + costs).amin(dim=2)  # over the third tap's gap
            best = torch.full_like(best, math.inf)
            for jump in range(1, span):  # the new state: newest + jump, gap1 = jump, gap2 = gap1
                best[jump:, jump, :] = values[: count - jump, :, jump - 1]
        return found

    def _table(self, calls: int) -> list[bool]:
        """Which steps are computed."""
        costs, end = self._tables
        _, (*trail, last) = self._best[calls]
        p0, gap1, gap2 = (
            int(i) for i in torch.unravel_index((last + end).argmin(), tuple(last.shape))
        )
        chosen = [p0]
        for best in reversed(trail):
            before, jump = p0 - gap1, gap1
            gap1, gap2 = gap2, int((best[before, gap2] + costs[before, gap2, :, jump - 1]).argmin())
            p0 = before
            chosen.append(p0)
        return [step in {0, *chosen} for step in range(self.steps)]

    # --- the weights --------------------------------------------------------------------------

    def _weights(
        self, computed: Sequence[bool]
    ) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[float, ...], ...]]:
        """(taps, weights) of every step, the drift of earlier forecasts made up for."""
        taps: list[tuple[int, ...]] = []
        weights: list[tuple[float, ...]] = []
        right, drift = self.right, torch.zeros_like(self.right[0])
        fading, newest = FADING ** (20 / self.steps), list[int]()
        for step, computes in enumerate(computed):
            gain = float(self.gains[step])
            if computes:
                drift = drift * fading + gain * (self.given[step] - right[step])
                newest = [step, *newest][:TAPS]
                taps.append(())
                weights.append(())
                continue
            aim = right[step] - (drift / gain if gain else 0 * drift)
            found = self._toward(newest, step, aim)
            drift = drift + gain * (found @ self.given[newest] - right[step])
            taps.append(tuple(newest))
            weights.append(tuple(found.tolist()))
        return tuple(taps), tuple(weights)

    def _toward(self, taps: list[int], step: int, aim: Tensor) -> Tensor:
        """Weights of these taps whose combination is nearest to `aim`, a row like `right`."""
        rows = self.given[taps]
        slope = float(
            (self.times[step] - self.times[taps[0]]) / (self.times[taps[0]] - self.times[taps[1]])
        )
        start = torch.tensor([1 + slope, -slope, *[0.0] * (len(taps) - 2)], dtype=torch.float64)
        ridge = self.ridge * RIDGE_OF_ALL / RIDGE
        square = rows @ rows.T + ridge * torch.eye(len(taps), dtype=torch.float64)
        return start + torch.linalg.solve(square, rows @ (aim - start @ rows))
