"""Which whole calls of a run to skip, and what stands for their outputs: planned from a kernel.

A skipped call is forecast from the last computed ones,

    output_t = sum_i w[t, i] * output_(tap i),    at most three taps, the newest first.

The exact dynamic programme over computed steps finds the table; its cost is the squared error of
the final sample / alpha, errors of one stretch of skipped calls added up as vectors: they point the
same way. The weights then make up for the drift that earlier forecasts left.
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
from .forecast_budget import Speedup, calls_for, check_speedup, tell
from .schedule import SHORTEST

TAPS = 3
RIDGE = 1e-6  # of the mean of the kernel's diagonal, toward linear extrapolation
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
    `SHORTEST` steps and where the sampler adds noise of its own at every step.
    """

    kernel: OutputKernel
    speedup: Speedup

    def __post_init__(self) -> None:
        check_speedup(self.speedup, MOST)

    def plan(
        self, timesteps: Sequence[float], stochastic: bool = False, per_step: float = 1.0
    ) -> ForecastPlan:
        """The plan for a run at these timesteps. per_step: how many of them a step has."""
        times = tuple(float(t) for t in timesteps)
        fits = len(times) / per_step >= SHORTEST and len(times) <= MOST
        if stochastic or self.speedup == 1 or not fits:
            return ForecastPlan.full(times)
        key = self.kernel.mark, self.speedup, times
        if key not in PLANS:
            if len(PLANS) >= KEPT:
                PLANS.pop(next(iter(PLANS)))
            programme = Programme(self.kernel.at(times))
            plan = programme.plan(calls_for(programme.errors, len(times), self.speedup))
            tell(plan.calls, len(times), plan.error, getattr(self.kernel, "origin", ""))
            PLANS[key] = plan
        return PLANS[key]


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
        ahead = torch.arange(1, self.span)
        steps = p0[:, None] + ahead  # (S, span - 1)
        inside = steps < self.steps
        residual = self._residual(states, steps.clamp_max(self.steps - 1))
        residual = residual * (self.gains[steps.clamp_max(self.steps - 1)] * inside)[..., None]
        total = residual.cumsum(1).square().sum(-1)  # (S, span - 1)
        costs = torch.cat([total.new_zeros(len(p0), 1), total], dim=1)
        costs = costs[:, : self.span]
        left = self.steps - 1 - p0  # calls after the newest
        end = torch.where(
            left < self.span,
            costs.gather(1, left.clamp_max(self.span - 1)[:, None])[:, 0],
            torch.full((), math.inf, dtype=torch.float64),
        )
        jumps = torch.arange(1, self.span + 1)
        return costs.masked_fill(p0[:, None] + jumps >= self.steps, math.inf), end

    def _residual(self, states: Tensor, steps: Tensor) -> Tensor:
        """output_t minus its forecast from the taps of a state: (S, n, R) for steps (S, n)."""
        weights = self._open(states, steps)  # (S, n, 3)
        taps = self.outputs[states.clamp_min(0)]  # (S, 3, R)
        return self.outputs[steps] - weights @ taps

    def _open(self, states: Tensor, steps: Tensor) -> Tensor:
        """Least-squares weights of the taps for the outputs at `steps`: (S, n, 3)."""
        known = states >= 0
        places = states.clamp_min(0)
        kernel = self.kernel.values
        square = kernel[places[:, :, None], places[:, None, :]]
        square = square * (known[:, :, None] & known[:, None, :])
        square = square + torch.diag_embed(torch.where(known, self.ridge, 1.0).double())
        start = self._linear(states, steps)
        wanted = kernel[places[:, None, :], steps[:, :, None]] * known[:, None, :]
        rest = wanted - start @ square + start * self.ridge  # the ridge pulls toward `start`
        return start + torch.linalg.solve(square, rest.transpose(1, 2)).transpose(1, 2)

    def _linear(self, states: Tensor, steps: Tensor) -> Tensor:
        """Linear extrapolation in the timestep from the two newest taps: (S, n, 3)."""
        newest, before = self.times[states[:, :1]], self.times[states[:, 1:2]]
        slope = (self.times[steps] - newest) / (newest - before)
        return torch.stack([1 + slope, -slope, torch.zeros_like(slope)], dim=-1)

    @cached_property
    def _best(self) -> dict[int, tuple[float, list[Tensor]]]:
        """For each number of calls: the least cost, and what leads there."""
        if self.steps < 3:
            return {}
        states, (costs, end) = self._states(), self._costs
        span, count = self.span, self.steps
        place = torch.full((count, span, span), -1, dtype=torch.int64)
        gap2 = torch.where(states[:, 2] < 0, 0, states[:, 1] - states[:, 2])
        place[states[:, 0], states[:, 0] - states[:, 1], gap2] = torch.arange(len(states))
        full_costs = torch.full((count, span, span, span), math.inf, dtype=torch.float64)
        full_end = torch.full((count, span, span), math.inf, dtype=torch.float64)
        where = place >= 0
        full_costs[where], full_end[where] = costs[place[where]], end[place[where]]
        best = torch.full((count, span, span), math.inf, dtype=torch.float64)
        best[1, 1, 0] = 0.0
        found: dict[int, tuple[float, list[Tensor]]] = {}
        trail: list[Tensor] = []
        for calls in range(2, count + 1):
            ended = best + full_end
            least = float(ended.amin())
            if math.isfinite(least):
                found[calls] = least, [*trail, ended.flatten().argmin()]
            moved = (best[..., None] + full_costs).min(dim=2)  # over the third tap's gap
            values, back = moved  # (count, span [gap1], span [jump - 1])
            best = torch.full_like(best, math.inf)
            for jump in range(1, span):  # the new state: newest + jump, gap1 = jump, gap2 = gap1
                best[jump:, jump, :] = values[: count - jump, :, jump - 1]
            trail.append(back)
        return found

    def _table(self, calls: int) -> list[bool]:
        """Which steps are computed."""
        _, (*trail, last) = self._best[calls]
        p0, gap1, gap2 = (
            int(i) for i in torch.unravel_index(last, (self.steps,) + (self.span,) * 2)
        )
        chosen = [p0]
        for back in reversed(trail):
            before, jump = p0 - gap1, gap1
            gap1, gap2 = gap2, int(back[before, gap2, jump - 1])
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
        drift = torch.zeros(self.outputs.shape[1], dtype=torch.float64)
        fading, newest = FADING ** (20 / self.steps), list[int]()
        for step, computes in enumerate(computed):
            if computes:
                drift, newest = drift * fading, [step, *newest][:TAPS]
                taps.append(())
                weights.append(())
                continue
            gain = float(self.gains[step])
            aim = self.outputs[step] - (drift / gain if gain else 0 * drift)
            found = self._toward(newest, step, aim)
            drift = drift + gain * (found @ self.outputs[newest] - self.outputs[step])
            taps.append(tuple(newest))
            weights.append(tuple(found.tolist()))
        return tuple(taps), tuple(weights)

    def _toward(self, taps: list[int], step: int, aim: Tensor) -> Tensor:
        """Weights of these taps whose combination is nearest to `aim` (R,)."""
        rows = self.outputs[taps]
        slope = float(
            (self.times[step] - self.times[taps[0]]) / (self.times[taps[0]] - self.times[taps[1]])
        )
        start = torch.tensor([1 + slope, -slope, 0.0][: len(taps)], dtype=torch.float64)
        square = rows @ rows.T + self.ridge * torch.eye(len(taps), dtype=torch.float64)
        return start + torch.linalg.solve(square, rows @ (aim - start @ rows))
