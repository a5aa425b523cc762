"""`ForecastCalls`: a denoiser's forward that computes a call, or forecasts it from earlier ones."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..model import map_tensors, tensors_in
from ..sampling import CallInProgress, Clock, call_in_progress
from .cells import CallShape
from .forecast_budget import say
from .forecast_plan import MOST, Forecast, ForecastPlan
from .history import combined
from .inner_patches import inner_patch
from .schedule import SHORTEST

log = logging.getLogger("tenuto")

NEAR = 1 / 2000  # of the largest timestep: a step further off is not the planned one
Ask = Callable[[nn.Module], CallInProgress]


class Planner(Protocol):
    """What makes the plan of a run (`Forecast`)."""

    def plan(
        self,
        timesteps: Sequence[float],
        stochastic: bool = False,
        per_step: float = 1.0,
        guidance: float | None = None,
    ) -> ForecastPlan:
        """The plan for a run at these timesteps."""
        ...


@dataclass(frozen=True)
class Computed:
    """One computed call: its step in the plan, its rows by stream, what it returned (a copy)."""

    step: int
    rows: dict[Hashable, int]
    streams: tuple[Hashable, ...]
    shape: Any
    out: Any


class ForecastCalls:
    """Calls of a denoiser under a plan for the run in progress. The clock must follow it.

    forecast: makes the plan for the timesteps of a run. Where streams, shapes or timesteps are not
    those that the plan needs, the call computes. What is returned is new: hosts add to it in place.
    ask: tells the guidance of a run, and whether noise is added; of a pipeline its call is asked.
    """

    def __init__(
        self, clock: Clock, forecast: Planner, denoiser: nn.Module, ask: Ask = call_in_progress
    ) -> None:
        self.ask = ask
        self.clock, self.forecast, self.shape = clock, forecast, CallShape(denoiser)
        self.counts = [0, 0]  # computed, forecast
        self.run: int | None = None
        self.plan = ForecastPlan.full(())
        self.known: list[Computed] = []
        self.told = CallInProgress()  # of the run
        self.checked: int | None = None  # the run in which `patch` was looked for
        self.patch = ""
        self.says = False  # whether a warning says why a run skips nothing; hosts say it themselves
        self.said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> ForecastCalls:
        made = copy.copy(self)
        made.clock, made.counts = copy.deepcopy(self.clock, memo), list(self.counts)
        made.run, made.known = None, []
        return made

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        shape = self.shape(args, kwargs, rows=True)
        step = self.step(module, fills=not isinstance(shape, tuple))
        if step is not None and not self.plan.computed[step] and self._may_skip(module):
            found = self._forecast(step, shape)
            if found is not None:
                self.counts[1] += 1
                return found
        out = original(*args, **kwargs)
        self.counts[0] += 1
        if step is not None and not all(self.plan.computed):
            self._keep(step, shape, out)
        return out

    def _may_skip(self, denoiser: nn.Module) -> bool:
        """Whether nothing inside the denoiser keeps what it sees of a call; once a run."""
        if self.checked != self.run:
            self.checked, patch = self.run, inner_patch(denoiser)
            if patch and not self.patch:
                log.warning(
                    "No call is skipped while a hook or a processor in %s reads along: it would "
                    "miss the skipped ones.", patch,
                )  # fmt: skip
            self.patch = patch
        return not self.patch

    def step(self, denoiser: nn.Module, fills: bool = False) -> int | None:
        """The step of the plan at which the clock is; None where it is at none of them.

        fills: the call fills a cache of the model's own. From what it returns nothing is forecast,
        so a run that begins with it is planned from the next step on.
        """
        clock = self.clock
        times = clock.grid or clock.timesteps
        if clock.run != self.run or times != self.plan.timesteps:
            if clock.run != self.run:
                self.told = self.ask(denoiser)
            self.run, self.known = clock.run, []
            noisy = clock.stochastic or self.told.noisy
            rest = self.forecast.plan(times[fills:], noisy, clock.per_step, self.told.guidance)
            self.plan = rest.after(times[:fills])
            if self.says and times and all(self.plan.computed):
                self._say(round(len(times) / clock.per_step), noisy)
        place = clock.place if clock.grid else clock.step
        largest = max((abs(t) for t in times), default=0.0)
        if not times or abs(times[place] - clock.time) > largest * NEAR:
            return None
        return place

    def _say(self, steps: int, noisy: bool) -> None:
        """Why this run skips nothing, once, where someone has asked for a speedup."""
        if isinstance(self.forecast, Forecast) and self.forecast.speedup != 1:
            say(why_full(self.forecast, steps, noisy, self.clock.whole), self.said)

    def _keep(self, step: int, shape: Any, out: Any) -> None:
        """Remember a computed call; a second one of the same step and streams replaces it.

        Steps that no later one is forecast from are forgotten.
        """
        streams = self.clock.streams
        kept = map_tensors(lambda t: t.detach().clone(), out)
        new = Computed(step, {s: i for i, s in enumerate(streams)}, streams, shape, kept)
        rest = [c for c in self.known if c.step != step or c.rows.keys() - new.rows.keys()]
        needed = {tap for taps in self.plan.taps[step:] for tap in taps}
        self.known = [new, *(c for c in rest if c.step in needed)]

    def _forecast(self, step: int, shape: Any) -> Any:
        """The output of the call, or None where a tap of one of its streams is missing."""
        taps = [self._tap(tap, shape) for tap in self.plan.taps[step]]
        if any(tap is None for tap in taps):
            return None
        try:
            return combined(taps, self.plan.weights[step])
        except (ValueError, RuntimeError):  # outputs of another form than before
            return None

    def _tap(self, step: int, shape: Any) -> Any:
        """What the streams of the call returned at an earlier step, in its own order."""
        streams = self.clock.streams
        found = [c for c in self.known if c.step == step and c.shape == shape]
        whole = next((c.out for c in found if c.streams == streams), None)
        if whole is not None:
            return whole
        rows = [next((c for c in found if s in c.rows), None) for s in streams]
        if not rows or any(c is None for c in rows):
            return None
        there = [(c, c.rows[s]) for c, s in zip(rows, streams, strict=True) if c is not None]
        outs = [c.out for c, _ in there]
        if any(t.ndim == 0 for out in outs for t in tensors_in(out)):
            return None

        def gathered(*parts: Tensor) -> Tensor:
            return torch.stack([t[row] for t, (_, row) in zip(parts, there, strict=True)])

        return map_tensors(gathered, *outs)


def why_full(forecast: Forecast, steps: int, stochastic: bool, whole: int = 0) -> str:
    """Why the plan for a run of so many steps skips no call, in one sentence.

    whole: steps of the run, where another denoiser has the rest; 0: it has none.
    """
    if stochastic:
        return "No call is skipped: this sampler adds noise of its own at every step."
    if whole and steps < SHORTEST:
        return (
            f"No call of a denoiser that has {steps} of the {whole} steps is skipped: it takes "
            f"{SHORTEST}."
        )
    if not SHORTEST <= steps <= MOST:
        return f"No call is skipped in a run of {steps} steps: it takes {SHORTEST} to {MOST}."
    return (
        f"No call is skipped: {steps} steps at a speedup of {forecast.speedup} have none to spare."
    )
