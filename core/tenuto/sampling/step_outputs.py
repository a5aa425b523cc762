"""What a pipeline hands to its scheduler, step by step: guided outputs, and their kernel.

The scheduler gets what guidance has made of the denoiser's answers, whichever way the pipeline
guides; that is what a forecast has to meet. Where it is u + g (c - u) of both halves of the
answers, in one call or in two, that is seen, and both halves count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..model import tensors_in
from .noise import NOISY, is_stochastic, noise_at, prediction_of
from .output_kernel import OutputKernel
from .scheduler_step import StandsIn

CHUNK = 2**20  # elements of the outputs that are multiplied at once
FEWEST = 3  # steps that a kernel is of
OFF = 1e-3, 1e-4  # of |output - u| and |output|, squared: rounding of half precision
CLOSER = (0.5, 0.25, 0.0)  # of the last timestep: where the noise is told, too


@dataclass(frozen=True, eq=False)
class Step:
    """A step of a run. gap: what the second half of the answers has that the first has not.

    own: the scheduler's timestep. dots: of (output - first half) with the gap, of the gap with
    itself, of (output - first half) and of the output with themselves.
    """

    own: float
    output: Tensor
    gap: Tensor | None = None
    dots: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def fits(self, guidance: float) -> bool:
        """Whether the output is its first half + guidance * gap."""
        along, gap, moved, whole = self.dots
        left = moved - 2 * guidance * along + guidance**2 * gap
        return self.gap is not None and left <= OFF[0] * moved + OFF[1] * whole


class StepOutputs:
    """The outputs of every step of a pipeline's runs. `kernel()` once they are over."""

    def __init__(self, pipe: Any) -> None:
        self.scheduler = getattr(pipe, "scheduler", None)
        self.sums: Tensor | None = None
        self.halves: Tensor | None = None
        self.guidance: float | None = None  # while that of every run is known, and the same
        self.images = 0
        self.noisy = False  # whether a step was asked to add noise
        self.steps: dict[float, float] | None = None  # the denoiser's timestep: the scheduler's
        self.answers: list[Tensor] = []  # of the denoiser, since the last step

    def saw(self, out: Any) -> None:
        """The denoiser's answer to a call."""
        found = next(tensors_in(out), None)
        if found is not None and self.scheduler is not None:
            self.answers = [*self.answers[-2:], found.detach()]

    @contextmanager
    def run(self, last: Callable[[], float | None]) -> Iterator[None]:
        """One run of the pipeline. last: the timestep of the denoiser's last call."""
        scheduler: Any = self.scheduler
        outputs = dict[float, Step]()
        self.answers = []
        if not callable(getattr(scheduler, "step", None)):
            yield
            return

        def step(given: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            now = last()
            if now is not None and isinstance(given, Tensor):  # of two calls a step the last one
                outputs[now] = step_seen(float(timestep), given.detach(), self.answers)
            self.answers = []
            self.noisy |= any((kwargs.get(name) or 0) > 0 for name in NOISY)
            return before(given, timestep, *args, **kwargs)

        before, held = scheduler.step, scheduler.__dict__.get("step")
        scheduler.__dict__["step"] = StandsIn(scheduler, step)
        try:
            yield
        finally:
            self.answers = []
            if held is None:
                del scheduler.__dict__["step"]
            else:
                scheduler.__dict__["step"] = held
        self._add(outputs)

    def _add(self, outputs: dict[float, Step]) -> None:
        """Add the products of one run's outputs; a run of other steps is left out."""
        found = list(outputs.values())
        steps = {time: step.own for time, step in outputs.items()}
        shapes = {tuple(step.output.shape) for step in found}
        if len(steps) < FEWEST or len(shapes) > 1 or self.steps not in (None, steps):
            return
        guidance, count = _guidance(found), len(found[0].output)
        rows = [step.output for step in found]
        halves = None if guidance is None else _halves(found, guidance) * count
        self.add(_products(rows, rows) * count, halves, guidance, steps, count, self.noisy)

    def seen(self) -> tuple[Any, ...]:
        """What `add` of another object takes."""
        return self.sums, self.halves, self.guidance, self.steps, self.images, self.noisy

    def add(
        self,
        sums: Tensor | None,
        halves: Tensor | None,
        guidance: float | None,
        steps: dict[float, float] | None,
        images: int,
        noisy: bool,
    ) -> None:
        """Add what there is of one run, see `seen`; of other steps it is left out."""
        self.noisy |= noisy
        if sums is None or self.steps not in (None, steps):
            return
        if self.sums is not None and (
            guidance is None or self.guidance is None or abs(guidance - self.guidance) > 0.01
        ):
            guidance = self.halves = None
        self.sums = sums if self.sums is None else self.sums + sums
        if guidance is not None and halves is not None:
            self.halves = halves if self.halves is None else self.halves + halves
        self.guidance = guidance
        self.steps, self.images = steps, self.images + images

    def kernel(self) -> OutputKernel | None:
        """Of all runs; None where there was none to see, or the noise of its steps is not known."""
        if self.sums is None or self.steps is None or not bool(self.sums.isfinite().all()):
            return None
        prediction = self.prediction()
        noise = [self.noise(own) for own in self.steps.values()]
        stochastic = self.noisy or is_stochastic(self.scheduler)
        if prediction is None or stochastic or None in noise:
            return None
        times = list(self.steps)
        if times not in (sorted(times), sorted(times, reverse=True)):
            return None
        alpha, sigma = zip(*(n for n in noise if n is not None), strict=True)
        known = {
            "prediction": prediction, "images": self.images, "guidance": self.guidance,
            "timesteps": times, "alpha": alpha, "sigma": sigma, "noise": self._between(),
        }  # fmt: skip
        sums = self.sums if self.halves is None else self.halves
        return OutputKernel.of(sums / self.images, known)

    def prediction(self) -> str | None:
        """What the outputs are, one of `PREDICTIONS`; None where it is not known."""
        return prediction_of(self.scheduler)

    def noise(self, timestep: float) -> tuple[float, float] | None:
        """(alpha, sigma) at a timestep of the scheduler's; None where it is not known."""
        return noise_at(self.scheduler, timestep)

    def _between(self) -> list[tuple[float, float, float]]:
        """(timestep, alpha, sigma) between the steps of the run and beyond them."""
        times, own = list((self.steps or {}).keys()), list((self.steps or {}).values())
        config = getattr(self.scheduler, "config", None)
        most = float(getattr(config, "num_train_timesteps", 1000)) - 1
        wanted = [(a + b) / 2 for a, b in pairwise(own)]
        wanted += [share * min(own) for share in CLOSER] + [(max(own) + most) / 2, most]
        slope = (times[-1] - times[0]) / (own[-1] - own[0])  # the denoiser may count otherwise
        found = []
        for time in sorted({t for t in wanted if t not in own and 0 <= t <= most}):
            noise = noise_at(self.scheduler, time)
            if noise is not None:
                found.append((times[0] + slope * (time - own[0]), *noise))
        return found


class GuidedOutputs(StepOutputs):
    """What a pipeline hands to its scheduler in one run, by the denoiser's timestep."""

    outputs: Mapping[float, Tensor] = {}

    def _add(self, outputs: dict[float, Step]) -> None:
        self.outputs = {time: step.output for time, step in outputs.items()}


def step_seen(own: float, output: Tensor, answers: Sequence[Tensor]) -> Step:
    """A step, with the gap between the halves of the denoiser's answers if there are two.

    own: the scheduler's timestep. output: (B, ...), what guidance made of the answers.
    """
    halves = answers
    if len(answers) == 1 and len(answers[0]) == 2 * len(output):
        halves = answers[0].chunk(2)
    kept = output.to("cpu", torch.float32, copy=True)
    if len(halves) != 2 or any(half.ndim != output.ndim for half in halves):
        return Step(own, kept)
    if output.ndim > 1:  # of a variance that is learned, too
        halves = [half[:, : output.shape[1]] for half in halves]
    if any(half.shape != output.shape for half in halves):
        return Step(own, kept)
    first, second = (half.to("cpu", torch.float32) for half in halves)
    moved, gap = kept - first, second - first
    pairs = (moved, gap), (gap, gap), (moved, moved), (kept, kept)
    dots = [float((a.double() * b).sum()) for a, b in pairs]
    return Step(own, kept, gap, (dots[0], dots[1], dots[2], dots[3]))


def _guidance(steps: Sequence[Step]) -> float | None:
    """By which g all outputs are u + g (c - u); None where they are not."""
    gap = sum(step.dots[1] for step in steps)
    found = sum(step.dots[0] for step in steps) / gap if gap > 0 else 0.0
    if gap <= 0 or not all(step.fits(found) for step in steps):
        return None
    return round(max(found, 1 - found), 4)  # whichever half comes first


def _halves(steps: Sequence[Step], guidance: float) -> Tensor:
    """The products of u with u, of u with c (symmetric), of c with c: float64 (3, T, T)."""
    gap = sum(step.dots[1] for step in steps)
    first = sum(step.dots[0] for step in steps) / gap >= 0.5  # else the conditional half is first
    gaps = [(step.gap if first else -step.gap) for step in steps if step.gap is not None]
    outputs = [step.output for step in steps]
    whole, mixed, apart = (
        _products(a, b) for a, b in ((outputs, outputs), (outputs, gaps), (gaps, gaps))
    )
    # u = output - g * gap, c = u + gap
    mixed = (mixed + mixed.T) / 2
    found = [
        whole - (p + q) * mixed + p * q * apart
        for p, q in (
            (guidance, guidance), (guidance, guidance - 1), (guidance - 1, guidance - 1),
        )
    ]  # fmt: skip
    return torch.stack(found)


def _products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The mean over elements of a[i] * b[j], float64 (len(a), len(b))."""
    rows, others = [x.flatten() for x in a], [x.flatten() for x in b]
    found = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows[0]), CHUNK):
        part, other = (
            torch.stack([x[start : start + CHUNK] for x in one]).double() for one in (rows, others)
        )
        found = found + part @ other.T
    return found / len(rows[0])
