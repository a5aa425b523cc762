"""`NoiseKernel`: a kernel looked up by noise, not by timesteps, for runs of any schedule."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TenutoError
from .between_steps import between, depth
from .noise import noise_at
from .output_kernel import OutputKernel

Noise = Callable[[Sequence[float]], "list[tuple[float, float]] | None"]
PROBE = tuple(float(t) for t in range(999, -1, -111))  # timesteps that tell schedules apart


@dataclass(frozen=True, eq=False)
class NoiseKernel(OutputKernel):
    """A kernel whose `timesteps` are angles of noise, atan2(sigma, alpha), falling.

    noise: (alpha, sigma) at each timestep of a whole run, in the unit that the denoiser gets; None
    where it is not known. origin: where the kernel comes from, for what is said of it.
    """

    noise: Noise = lambda _: None
    origin: str = ""

    @property
    def mark(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The same for equal kernels under equal schedules alone."""
        seen = f"{super().mark} {self.noise(PROBE)}"
        return hashlib.sha256(seen.encode()).hexdigest()

    def at(self, timesteps: Sequence[float]) -> OutputKernel:
        """Of a run at these timesteps, by the noise that the schedule has there."""
        times = tuple(float(t) for t in timesteps)
        found = self.noise(times)
        if found is None:
            raise TenutoError("The noise at the steps of this run is not known.")
        alpha, sigma = (torch.tensor(row, dtype=torch.float64) for row in zip(*found, strict=True))
        own = (torch.tensor(row, dtype=torch.float64) for row in (self.alpha, self.sigma))
        values = between(self.values, depth(*own), depth(alpha, sigma))
        shares = tuple(alpha.tolist()), tuple(sigma.tolist())
        return OutputKernel(values, times, *shares, self.prediction, self.images)


def noises_at(scheduler: Any, timesteps: Sequence[float]) -> list[tuple[float, float]] | None:
    """(alpha, sigma) at the timesteps of a whole run, as the denoiser gets them; None: not known.

    Some denoisers count t, others t / 1000, others 1 - t / 1000, which rises in a run.
    """
    count = float(getattr(scheduler.config, "num_train_timesteps", 1000))
    times = list(timesteps)
    if max(times) <= 1:
        rises = times[0] < times[-1]
        times = [(1 - t if rises else t) * count for t in times]
    found = [noise_at(scheduler, t) for t in times]
    known = [pair for pair in found if pair is not None]
    return known if len(known) == len(found) else None


@dataclass(frozen=True, eq=False)
class PipelineNoise:
    """`Noise` of whichever scheduler a pipeline has by then; the pipeline is not kept alive."""

    pipeline: weakref.ref[Any]

    def __call__(self, timesteps: Sequence[float]) -> list[tuple[float, float]] | None:
        """(alpha, sigma) at each."""
        scheduler = getattr(self.pipeline(), "scheduler", None)
        return None if scheduler is None else noises_at(scheduler, timesteps)
