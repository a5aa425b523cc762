"""What a denoiser's outputs at two steps have in common: all that a forecast is planned from.

The kernel of one recorded run, K[a, b] = mean over images and elements of output_a * output_b, says
how well a combination of some outputs stands for another one. It is nearly a property of the
data and the noise schedule: other weights of the same kind have nearly the same.

Where a pipeline guides by u + g (c - u), both halves are kept apart, for a run with another g.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import TenutoError
from .between_steps import between, depth
from .grid import places_of

PREDICTIONS = ("v", "eps", "x0", "flow")


@dataclass(frozen=True, eq=False)
class OutputKernel:
    """Of T recorded steps.

    values: float64 (T, T), symmetric. timesteps: T, in executed order, as the denoiser gets them.
    sigma: the share of noise in the sample at each of them; alpha: of the image. In flow matching
    alpha + sigma = 1, else their squares add up to 1. prediction: what the denoiser answers, one
    of `PREDICTIONS`. images: how many were recorded. halves: float64 (3, T, T), the products of
    unconditional outputs u, of both halves (symmetric) and of conditional ones c, where `values`
    are those of u + guidance * (c - u); None where outputs are not guided so.
    noise_between: (timestep, alpha, sigma) at further timesteps, for runs at other ones.
    remaining: how much of what an error in each step's output does to the sample is left at the end
    of a run, where it was measured. rounding: the mean squared error of each step's output (guided)
    that a quantized model adds, where it was measured; the kernel itself is of full precision.
    """

    values: Tensor
    timesteps: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    prediction: str
    images: int = 1
    halves: Tensor | None = field(default=None, kw_only=True)
    guidance: float | None = field(default=None, kw_only=True)
    noise_between: tuple[tuple[float, float, float], ...] = field(default=(), kw_only=True)
    remaining: tuple[float, ...] = field(default=(), kw_only=True)
    rounding: tuple[float, ...] = field(default=(), kw_only=True)

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
        shares += tuple(x for row in self.noise_between for x in row[1:])
        size = self.values.shape[0]
        if self.halves is not None and (
            tuple(self.halves.shape) != (3, size, size) or self.guidance is None
        ):
            raise TenutoError("The halves of a kernel are three tables, of a known guidance.")
        if len(self.remaining) not in (0, steps) or not all(0 < x < 1e9 for x in self.remaining):
            raise TenutoError("What remains of an error is a positive number of every step.")
        if len(self.rounding) not in (0, steps) or not all(0 <= x < 1e9 for x in self.rounding):
            raise TenutoError("What rounding adds is a squared error of every step.")
        finite = bool(self.values.isfinite().all()) and all(0 <= x <= 1 for x in shares)
        if not finite or float(self.values.diagonal().amin()) < 0:
            raise TenutoError("A kernel of outputs has finite numbers, and noise from 0 to 1.")

    @staticmethod
    def of(stored: Tensor, about: Mapping[str, Any]) -> OutputKernel:
        """From what is `stored`, a table or those of both halves, and what `about` says of it."""
        times, alpha, sigma = (
            tuple(float(x) for x in about[key]) for key in ("timesteps", "alpha", "sigma")
        )
        noise = tuple((float(t), float(a), float(s)) for t, a, s in about.get("noise", ()))
        guidance, halves = about.get("guidance"), None
        guidance = None if guidance is None else float(guidance)
        if stored.ndim == 3:
            guidance, halves = float(about["guidance"]), stored
            stored = _guided(halves, guidance)
        return OutputKernel(
            stored, times, alpha, sigma, str(about["prediction"]), int(about["images"]),
            halves=halves, guidance=guidance, noise_between=noise,
            remaining=tuple(float(x) for x in about.get("remaining", ())),
            rounding=tuple(float(x) for x in about.get("rounding", ())),
        )  # fmt: skip

    @property
    def stored(self) -> Tensor:
        """All that an artifact keeps of it beside `about`: (T, T), or (3, T, T) of both halves."""
        return self.values if self.halves is None else self.halves

    def guided(self, guidance: float | None) -> OutputKernel:
        """The same for a run with this guidance; as recorded where either is not known."""
        if guidance is None or self.halves is None or guidance == self.guidance:
            return self
        return replace(self, values=_guided(self.halves, guidance), guidance=guidance)

    @cached_property
    def mark(self) -> str:
        """The same for equal kernels alone."""
        found = hashlib.sha256(self.values.cpu().contiguous().numpy().tobytes())
        found.update(json.dumps(self.about()).encode())
        return found.hexdigest()

    def about(self) -> dict[str, Any]:
        """Everything but what is `stored`, as plain data."""
        known = {
            "of": "both halves of guidance" if self.halves is not None else "guided outputs",
            "guidance": self.guidance,
            "noise": [list(row) for row in self.noise_between],
            "remaining": list(self.remaining),
            "rounding": list(self.rounding),
        }
        return {
            "timesteps": list(self.timesteps),
            "alpha": list(self.alpha),
            "sigma": list(self.sigma),
            "prediction": self.prediction,
            "images": self.images,
            **{key: value for key, value in known.items() if value not in (None, [])},
        }

    def at(self, timesteps: Sequence[float]) -> OutputKernel:
        """The same for a run at other timesteps, of the guidance that this is of; see `between`."""
        times = tuple(float(t) for t in timesteps)
        if times == self.timesteps:
            return self
        alpha, sigma = self._noise(times)
        values = between(self.values, depth(*self._noise(self.timesteps)), depth(alpha, sigma))
        shares = tuple(alpha.tolist()), tuple(sigma.tolist())
        left, rounding = (self._moved(of, times) for of in (self.remaining, self.rounding))
        return OutputKernel(
            values, times, *shares, self.prediction, self.images, remaining=left, rounding=rounding
        )

    def _moved(self, of_steps: tuple[float, ...], times: Sequence[float]) -> tuple[float, ...]:
        """Such a number of each step at other steps: in proportion between the nearest two."""
        if not of_steps:
            return ()
        places = places_of(times, self.timesteps)
        known = torch.tensor(of_steps, dtype=torch.float64).clamp_min(1e-30).log()
        low = places.floor().long().clamp(0, len(known) - 2)
        return tuple(known[low].lerp(known[low + 1], (places - low).clamp(0, 1)).exp().tolist())

    def _noise(self, times: Sequence[float]) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at other steps: a flow's share of noise, or the angle, interpolated."""
        rows = {t: (a, s) for t, a, s in self.noise_between}
        rows |= {t: (a, s) for t, a, s in zip(self.timesteps, self.alpha, self.sigma, strict=True)}
        known = sorted(rows)
        alpha, sigma = torch.tensor([rows[t] for t in known], dtype=torch.float64).T
        flow = self.prediction == "flow"
        level = sigma if flow else torch.atan2(sigma, alpha)
        found = _cubic(places_of(times, known), len(known)) @ level
        found = found + _beyond(times, known, level)
        if flow:
            found = found.clamp(0, 1)
            return 1 - found, found
        found = found.clamp(0, math.pi / 2)
        return found.cos(), found.sin()

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


def _guided(halves: Tensor, guidance: float) -> Tensor:
    """The products of u + guidance * (c - u): (T, T)."""
    g = guidance
    return (1 - g) ** 2 * halves[0] + 2 * g * (1 - g) * halves[1] + g**2 * halves[2]


def _beyond(times: Sequence[float], known: Sequence[float], level: Tensor) -> Tensor:
    """How much the noise changes from the outermost of the `known` steps (rising), linearly."""
    at, wanted = (torch.tensor(x, dtype=torch.float64) for x in (known, times))
    low = (wanted - at[0]).clamp_max(0) * (level[1] - level[0]) / (at[1] - at[0])
    high = (wanted - at[-1]).clamp_min(0) * (level[-1] - level[-2]) / (at[-1] - at[-2])
    return low + high


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
