"""L2P (arXiv 2604.26365): the output of a skipped call is a linear predictor of all before it.

Reference formula: y[t] = sum_(s<t) W[t, s] y[s], one row of scalars a step, shared by all elements;
the y of skipped steps are predictions, which take part too. W minimises the squared error on the
outputs of full runs. Its steps are a fixed list: the first `first`, then one of `period`.

Each row is a least-squares problem, so that no training loop is needed: the kernel of one
recording has all of its sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import TenutoError
from ..model import Override, override_
from ..sampling import Clock, OutputKernel
from .budget import whole_steps
from .forecast import ForecastCalls
from .forecast_plan import MOST, ForecastPlan
from .interval import LateInterval, late_interval_for
from .policy import Facts


@dataclass(frozen=True, eq=False)
class L2P:
    """By the `kernel` of a recording.

    ridge: of the mean of its diagonal, toward the output before. Published is a short descent that
    begins at the identity; without either the rows fit the noise of their own recording.
    """

    kernel: OutputKernel
    first: int = 2
    period: int = 4
    ridge: float = 1e-3

    name: ClassVar[str] = "l2p"

    def plan(
        self,
        timesteps: Sequence[float],
        stochastic: bool = False,
        per_step: float = 1.0,
        guidance: float | None = None,
    ) -> ForecastPlan:
        """Which calls of a run are computed, and each other's weights over those before it."""
        times = tuple(float(t) for t in timesteps)
        if stochastic or len(times) > MOST:
            return ForecastPlan.full(times)
        computed = LateInterval(self.first, self.period)(times, ("",)).table[:, 0].tolist()
        taps, weights = predictors(
            self.kernel.guided(guidance).at(times).values, computed, self.ridge
        )
        return ForecastPlan(times, tuple(computed), taps, weights)

    def apply_(self, denoiser: nn.Module, clock: Clock) -> list[Override]:
        """Put it on `denoiser`, which the clock follows."""
        return [override_(denoiser, ForecastCalls(clock, self, denoiser))]

    @property
    def label(self) -> str:
        """As a search lists it."""
        return f"{self.name} {self.first}/{self.period}"

    @classmethod
    def at_share(
        cls, share: float, facts: Facts, kernel: OutputKernel, ridge: float = 1e-3
    ) -> list[L2P]:
        """Every one that skips as near to `share`, in whole steps, as any."""
        whole = whole_steps(share, len(facts.timesteps))
        found = late_interval_for(whole, facts.timesteps, ("",))
        return [cls(kernel, late.first, late.period, ridge) for late in found]


def predictors(
    kernel: Tensor, computed: Sequence[bool], ridge: float
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[float, ...], ...]]:
    """(taps, weights) of every step: of skipped ones over the computed steps before, newest first.

    kernel: (T, T). The row of a step is solved over all steps before it, on true outputs; what it
    gives to predicted ones then goes to those that they are made of.
    """
    steps, floor = len(kernel), ridge * float(kernel.diagonal().mean())
    if steps != len(computed) or not computed[0]:
        raise TenutoError("A predictor computes the first of the steps of its kernel.")
    made = torch.eye(steps, dtype=torch.float64)  # each step's output over the computed ones
    taps, weights = list[tuple[int, ...]](), list[tuple[float, ...]]()
    for step, computes in enumerate(computed):
        known = [i for i in range(step) if computed[i]][::-1]
        if computes:
            taps.append(())
            weights.append(())
            continue
        square = kernel[:step, :step] + floor * torch.eye(step, dtype=torch.float64)
        start = torch.zeros(step, dtype=torch.float64)
        start[-1] = 1.0
        row = start + torch.linalg.solve(square, kernel[:step, step] - kernel[:step, step - 1])
        made[step] = row @ made[:step]
        taps.append(tuple(known))
        weights.append(tuple(made[step, known].tolist()))
    return tuple(taps), tuple(weights)
