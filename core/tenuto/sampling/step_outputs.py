"""What a pipeline hands to its scheduler, step by step: guided outputs, and their kernel.

The scheduler gets what guidance has made of the denoiser's answers, whichever way the pipeline
guides; that is what a forecast has to meet.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .noise import is_stochastic, noise_at, prediction_of
from .output_kernel import OutputKernel

CHUNK = 2**20  # elements of the outputs that are multiplied at once
FEWEST = 3  # steps that a kernel is of


class StepOutputs:
    """The outputs of every step of a pipeline's runs. `kernel()` once they are over."""

    def __init__(self, pipe: Any) -> None:
        self.scheduler = getattr(pipe, "scheduler", None)
        self.sums: Tensor | None = None
        self.images = 0
        self.steps: dict[float, float] | None = None  # the denoiser's timestep: the scheduler's

    @contextmanager
    def run(self, last: Callable[[], float | None]) -> Iterator[None]:
        """One run of the pipeline. last: the timestep of the denoiser's last call."""
        scheduler: Any = self.scheduler
        outputs = dict[float, tuple[float, Tensor]]()
        if not callable(getattr(scheduler, "step", None)):
            yield
            return

        def step(given: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            now = last()
            if now is not None and isinstance(given, Tensor):  # of two calls a step the last one
                outputs[now] = float(timestep), given.detach().to("cpu", torch.float32, copy=True)
            return before(given, timestep, *args, **kwargs)

        before, held = scheduler.step, scheduler.__dict__.get("step")
        scheduler.__dict__["step"] = _Watched(scheduler, step)
        try:
            yield
        finally:
            if held is None:
                del scheduler.__dict__["step"]
            else:
                scheduler.__dict__["step"] = held
        self._add(outputs)

    def _add(self, outputs: dict[float, tuple[float, Tensor]]) -> None:
        """Add the products of one run's outputs; a run of other steps is left out."""
        steps = {time: own for time, (own, _) in outputs.items()}
        shapes = {tuple(x.shape) for _, x in outputs.values()}
        if len(steps) < FEWEST or len(shapes) > 1 or self.steps not in (None, steps):
            return
        rows = [x.flatten() for _, x in outputs.values()]
        count, found = len(next(iter(outputs.values()))[1]), torch.zeros((), dtype=torch.float64)
        for start in range(0, len(rows[0]), CHUNK):
            part = torch.stack([row[start : start + CHUNK] for row in rows]).double()
            found = found + part @ part.T
        self.add(found * (count / len(rows[0])), steps, count)

    def add(self, sums: Tensor | None, steps: dict[float, float] | None, images: int) -> None:
        """Add what there is of one run; of other steps it is left out.

        sums: the mean products over elements, summed over images; None: there is nothing.
        """
        if sums is None or steps is None or self.steps not in (None, steps):
            return
        self.sums = sums if self.sums is None else self.sums + sums
        self.steps, self.images = steps, self.images + images

    def kernel(self) -> OutputKernel | None:
        """Of all runs; None where there was none to see, or the noise of its steps is not known."""
        if self.sums is None or self.steps is None or not bool(self.sums.isfinite().all()):
            return None
        prediction = prediction_of(self.scheduler)
        noise = [noise_at(self.scheduler, own) for own in self.steps.values()]
        if prediction is None or is_stochastic(self.scheduler) or None in noise:
            return None
        times = list(self.steps)
        if times not in (sorted(times), sorted(times, reverse=True)):
            return None
        alpha, sigma = zip(*(n for n in noise if n is not None), strict=True)
        return OutputKernel(
            self.sums / self.images, tuple(times), alpha, sigma, prediction, self.images
        )


class _Watched:
    """A scheduler's step that is looked at; a copy of the scheduler has its own, unwatched."""

    def __init__(self, owner: Any, call: Callable[..., Any]) -> None:
        self.owner, self.call = owner, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.owner), self.owner)
        return types.MethodType(type(copied).step, copied)
