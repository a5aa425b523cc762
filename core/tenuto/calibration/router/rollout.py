"""Sampling runs under a schedule: the errors of schedules, the costs of single steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...caching import CacheSchedule, apply_schedule_
from ...model import Override, Signature, denoiser_of, frozen, override_, tensors_in
from ...progress import Progress
from ...sampling import Clock, Follow, Trajectory

Call = Callable[..., Any]


@contextmanager
def intercepted(
    denoiser: nn.Module,
    timesteps: Sequence[float],
    schedule: CacheSchedule | None = None,
    call: Callable[[Clock], Call] | None = None,
) -> Iterator[Clock]:
    """`denoiser` followed by a clock, under a schedule, its forward replaced by `call(clock)`.

    All of it is taken out again, whatever happens inside.
    """
    clock = Clock(timesteps)
    patches: list[Follow | Override] = [Follow(denoiser, clock)]
    try:
        if schedule is not None:
            patches += apply_schedule_(denoiser, schedule, clock)
        if call is not None:
            patches.append(override_(denoiser, call(clock)))
        yield clock
    finally:
        while patches:
            patches.pop().remove()


def references(
    denoiser: nn.Module, trajectory: Trajectory, seeds: Sequence[int], batch: int
) -> Tensor:
    """What the plain denoiser makes of `seeds`, `batch` images each: fp32 (n, ...) on the CPU."""
    sample = trajectory.rollout()
    with frozen(denoiser), torch.no_grad():
        return torch.cat([sample(denoiser, seed, batch).float().cpu() for seed in seeds])


def errors(
    denoiser: nn.Module,
    schedule: CacheSchedule,
    trajectory: Trajectory,
    seeds: Sequence[int],
    batch: int,
    reference: Tensor,
) -> Tensor:
    """Mean squared error (n,) of each image, or of its latent where there is one."""
    with intercepted(denoiser, trajectory.timesteps, schedule):
        found = references(denoiser, trajectory, seeds, batch)
    return (found - reference).square().flatten(1).mean(1)


def evaluate(
    model: Any,
    schedules: Mapping[str, CacheSchedule],
    trajectory: Trajectory,
    seeds: Sequence[int],
    batch: int,
    on_progress: Progress | None = None,
) -> dict[str, float]:
    """The mean over images of each schedule's squared error to the un-cached run of `model`."""
    denoiser = denoiser_of(model)
    reference = references(denoiser, trajectory, seeds, batch)
    found = {}
    for done, (name, schedule) in enumerate(schedules.items()):
        if on_progress:
            on_progress(done, len(schedules), name)
        error = errors(denoiser, schedule, trajectory, seeds, batch, reference)
        found[name] = float(error.mean())
    return found


def step_costs(
    denoiser: nn.Module,
    trajectory: Trajectory,
    branches: Sequence[str],
    seed: int,
    batch: int,
    on_progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """What it costs to reuse every branch at one step alone: (result, step), both fp64 (T,).

    result: mean squared error of the final latent. step: mean squared error of the guided output
    of that step itself. Steps that the reuse cannot change are played back, so that the T - 1
    runs together compute half of what T runs would. The first step, never reused, has zeros.
    """
    times, sample = trajectory.timesteps, trajectory.rollout()
    result, step = torch.zeros(2, len(times), dtype=torch.float64).unbind()
    tape = Tape(Guide(denoiser, trajectory.guidance, batch))
    with frozen(denoiser), torch.no_grad():
        with intercepted(denoiser, times, call=tape.record):
            reference = sample(denoiser, seed, batch)
        for row in range(1, len(times)):
            if on_progress:
                on_progress(row - 1, len(times) - 1, "cost of single steps")
            computed = [i != row for i in range(len(times))]
            schedule = CacheSchedule.steps(computed, times, branches)
            tape.rewind(row)
            with intercepted(denoiser, times, schedule, tape.play):
                found = sample(denoiser, seed, batch)
            result[row] = (found - reference).double().square().mean()
            step[row] = tape.error()
    return result, step


class Tape:
    """The outputs of one sampling run, played back up to the step before `row`."""

    def __init__(self, guide: Guide) -> None:
        self.guide, self.outputs, self.row, self.place = guide, [], 0, 0
        self._found: list[Tensor] = []

    def record(self, clock: Clock) -> Call:
        """A forward that keeps what it returns."""

        def call(original: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            self.outputs.append(copy.deepcopy(out))
            return out

        return call

    def rewind(self, row: int) -> None:
        """Back to the start; the calls from step `row` - 1 on will be computed."""
        self.row, self.place, self._found = row, 0, []

    def play(self, clock: Clock) -> Call:
        """A forward that hands out what was recorded, and from step `row` - 1 on computes."""

        def call(original: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            place, self.place = self.place, self.place + 1
            facts = self.guide.facts
            if clock.step < self.row - 1 and not facts.fills(facts.inputs(args, kwargs)):
                return copy.deepcopy(self.outputs[place])
            out = original(*args, **kwargs)
            if clock.step == self.row:
                gap = self.guide(self.outputs[place], args, kwargs) - self.guide(out, args, kwargs)
                self._found.append(gap.double().square().mean())
            return out

        return call

    def error(self) -> Tensor:
        """Mean squared difference of the guided outputs at step `row`."""
        return torch.stack(self._found).mean()


class Guide:
    """The guided output of a denoiser call, where its two halves came in one batch.

    Which half is the unconditional one shows in the conditions: all its rows are equal. Where that
    decides nothing it is the first, as in most diffusers pipelines.
    """

    def __init__(self, denoiser: nn.Module, guidance: float | None, batch: int) -> None:
        self.guidance, self.batch = guidance, batch
        self.facts = Signature(denoiser)
        self._first: bool | None = None

    def __call__(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """u + guidance (c - u) of shape (batch, ...), or the raw output if it is not in halves."""
        inputs, found = self.facts.inputs(args, kwargs), list(tensors_in(out))
        listed = not isinstance(self.facts.sample(inputs), Tensor)  # so is the output
        raw = torch.stack(found) if listed else found[0]
        if self.guidance in (None, 1) or raw.shape[0] != 2 * self.batch:
            return raw
        if self._first is None:
            self._first = self._unconditional_first(inputs)
        a, b = raw.chunk(2)
        without, given = (a, b) if self._first else (b, a)
        return without + self.guidance * (given - without)

    def _unconditional_first(self, inputs: dict[str, Any]) -> bool:
        for condition in self.facts.conditions(inputs):
            single = isinstance(condition, Tensor) and not condition.ndim
            if not single and len(condition) == 2 * self.batch:
                halves = condition[: self.batch], condition[self.batch :]
                constant = [all(torch.equal(half[0], row) for row in half) for half in halves]
                if constant[0] != constant[1]:
                    return constant[0]
        return True
