"""What a denoiser's outputs at two steps have in common: all that a forecast is planned from.

The kernel of one recorded run, K[a, b] = mean over images and elements of output_a * output_b, says
how well a combination of some outputs stands for another one. It is nearly a property of the
data and the noise schedule: other weights of the same kind have nearly the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import TenutoError
from .grid import places_of

PREDICTIONS = ("v", "eps", "x0", "flow")


@dataclass(frozen=True, eq=False)
class OutputKernel:
    """Of T recorded steps.

    values: float64 (T, T), symmetric. timesteps: T, in executed order, as the denoiser gets them.
    sigma: the share of noise in the sample at each of them; alpha: of the image. In flow matching
    alpha + sigma = 1, else their squares add up to 1. prediction: what the denoiser answers, one
    of `PREDICTIONS`. images: how many were recorded. remaining: how much of what an error in each
    step's output does to the sample is left at the end of a run, where it was measured.
    """

    values: Tensor
    timesteps: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    prediction: str
    images: int = 1
    remaining: tuple[float, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if self.prediction not in PREDICTIONS:
            raise TenutoError(f"A denoiser predicts {', '.join(PREDICTIONS)}, not this.")
        if tuple(self.values.shape) != (steps, steps) or steps < 2:
            raise TenutoError(f"A kernel of {steps} steps is a table of {steps} by {steps}.")
        if len(self.alpha) != steps or len(self.sigma) != steps:
            raise TenutoError("A kernel knows the noise of every step.")
        jumps = [b - a for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)]
        if not (all(s > 0 for s in jumps) or all(s < 0 for s in jumps)):
            raise TenutoError("The steps of a kernel go one way.")
        shares = (*self.alpha, *self.sigma)
        if len(self.remaining) not in (0, steps) or not all(0 < x < 1e9 for x in self.remaining):
            raise TenutoError("What remains of an error is a positive number of every step.")
        finite = bool(self.values.isfinite().all()) and all(0 <= x <= 1 for x in shares)
        if not finite or float(self.values.diagonal().amin()) < 0:
            raise TenutoError("A kernel of outputs has finite numbers, and noise from 0 to 1.")

    @staticmethod
    def of(values: Tensor, about: Mapping[str, Any]) -> OutputKernel:
        """From its table and what `about` says of it."""
        times, alpha, sigma = (
            tuple(float(x) for x in about[key]) for key in ("timesteps", "alpha", "sigma")
        )
        images, left = int(about["images"]), tuple(float(x) for x in about.get("remaining", ()))
        return OutputKernel(
            values, times, alpha, sigma, str(about["prediction"]), images, remaining=left
        )

    @cached_property
    def mark(self) -> str:
        """The same for equal kernels alone."""
        found = hashlib.sha256(self.values.cpu().contiguous().numpy().tobytes())
        found.update(json.dumps(self.about()).encode())
        return found.hexdigest()

    def about(self) -> dict[str, Any]:
        """Everything but its table, as plain data."""
        return {
            "timesteps": list(self.timesteps),
            "alpha": list(self.alpha),
            "sigma": list(self.sigma),
            "prediction": self.prediction,
            "images": self.images,
        } | ({"remaining": list(self.remaining)} if self.remaining else {})

    def at(self, timesteps: Sequence[float]) -> OutputKernel:
        """The same for a run at other timesteps: outputs between the recorded ones interpolated.

        By the cubic through the four nearest recorded steps.
        """
        times = tuple(float(t) for t in timesteps)
        if times == self.timesteps:
            return self
        mixed = _cubic(places_of(times, self.timesteps), len(self.timesteps))
        alpha, sigma = self._noise(mixed)
        values = mixed @ self.values @ mixed.T
        left = self._remaining(places_of(times, self.timesteps))
        return OutputKernel(
            values, times, alpha, sigma, self.prediction, self.images, remaining=left
        )

    def _remaining(self, places: Tensor) -> tuple[float, ...]:
        """What remains of an error at other steps: in proportion between the nearest two."""
        if not self.remaining:
            return ()
        known = torch.tensor(self.remaining, dtype=torch.float64).log()
        low = places.floor().long().clamp(0, len(known) - 2)
        return tuple(known[low].lerp(known[low + 1], (places - low).clamp(0, 1)).exp().tolist())

    def _noise(self, mixed: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """alpha and sigma at other steps: a flow's share of noise, or the angle, interpolated."""
        sigma = torch.tensor(self.sigma, dtype=torch.float64)
        alpha = torch.tensor(self.alpha, dtype=torch.float64)
        if self.prediction == "flow":
            found = (mixed @ sigma).clamp(0, 1)
            return tuple((1 - found).tolist()), tuple(found.tolist())
        angle = (mixed @ torch.atan2(sigma, alpha)).clamp(0, math.pi / 2)
        return tuple(angle.cos().tolist()), tuple(angle.sin().tolist())

    def gains(self) -> Tensor:
        """How far an error of 1 in each step's output moves sample / alpha: float64 (T,).

        Of one step of the solver, sample' / alpha' = sample / alpha + (noise' - noise) * eps with
        noise = sigma / alpha, to a sample without noise after the last; and what is left
        of that, where it was measured.
        """
        sigma = torch.tensor(self.sigma, dtype=torch.float64)
        alpha = torch.tensor(self.alpha, dtype=torch.float64).clamp_min(1e-9)
        after_sigma = torch.cat([sigma[1:], sigma.new_zeros(1)])
        after_alpha = torch.cat([alpha[1:], alpha.new_ones(1)])
        # (sigma' / alpha' - sigma / alpha) * alpha, without the quotient that is huge at the start
        moved = (after_sigma * alpha - sigma * after_alpha) / after_alpha
        if self.prediction == "eps":
            moved = moved / alpha
        if self.prediction == "x0":
            moved = moved / sigma.clamp_min(1e-9)
        return moved * torch.tensor(self.remaining).double() if self.remaining else moved


def _cubic(places: Tensor, count: int) -> Tensor:
    """Weights of `count` values for what lies at `places` among them, Lagrange: (n, count)."""
    size = min(4, count)
    first = (places.floor().long() - 1).clamp(0, count - size)
    near = first[:, None] + torch.arange(size)
    gap = places[:, None] - near  # (n, size)
    weights = torch.ones_like(gap)
    for i in range(size):
        for j in range(size):
            if i != j:
                weights[:, i] = weights[:, i] * gap[:, j] / (i - j)
    found = torch.zeros(len(places), count, dtype=torch.float64)
    return found.scatter_(1, near, weights.double())
