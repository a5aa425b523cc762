"""MagCache (Ma et al., arXiv 2506.09045): a law of magnitudes, measured once, says what to skip.

Reference formula: ratio_t = mean over places of |r_t| / |r_(t-1)|, r what all blocks together add.
While steps are skipped, m <- m * ratio_t and error <- error + |1 - m|; a step is skipped while
error <= threshold and no more than `longest` are in a row. The first fifth of a run computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..errors import TenutoError
from ..model import Override
from ..sampling import Clock
from .at_run_time import Gate, RunTimeCalls


@dataclass(frozen=True)
class MagCache:
    """By `ratios`, one a step of the measured run; other runs take the nearest.

    threshold, longest, retained (a share of the run): as published .06, 3 and .2. residual: of a
    model without a chain of blocks, whether outputs are kept less the sample.
    """

    ratios: tuple[float, ...]
    threshold: float = 0.06
    longest: int = 3
    retained: float = 0.2
    residual: bool = False

    name: ClassVar[str] = "magcache"
    computes: ClassVar[int | None] = 0

    def __post_init__(self) -> None:
        if len(self.ratios) < 2:
            raise TenutoError("MagCache needs a ratio of magnitudes for every step of a run.")

    def gate(self) -> Gate:
        """A new one."""
        return _Gate(self)

    def apply_(self, denoiser: nn.Module, clock: Clock) -> list[Override]:
        """Put it on `denoiser`, which the clock follows."""
        return RunTimeCalls(clock, self, denoiser).overrides(denoiser)


class _Gate:
    def __init__(self, policy: MagCache) -> None:
        self.policy = policy
        self.reset()

    def reset(self) -> None:
        self.magnitude, self.error, self.skipped = 1.0, 0.0, 0

    def skips(self, seen: Tensor, step: int, steps: int) -> bool:
        policy = self.policy
        if step < int(policy.retained * steps + 0.5):
            return False
        last = len(policy.ratios) - 1
        self.magnitude *= policy.ratios[round(step * last / max(1, steps - 1))]
        self.error += abs(1 - self.magnitude)
        self.skipped += 1
        if self.error <= policy.threshold and self.skipped <= policy.longest:
            return True
        self.reset()
        return False

    def computed(self, seen: Tensor, kept: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Magnitudes:
    """Measures the ratios: skips nothing, `found` gets what each call of each step says."""

    found: dict[int, list[float]]
    residual: bool = False

    computes: ClassVar[int | None] = 0

    def gate(self) -> Gate:
        """A new one."""
        return _Meter(self.found)

    def apply_(self, denoiser: nn.Module, clock: Clock) -> list[Override]:
        """Put it on `denoiser`, which the clock follows."""
        return RunTimeCalls(clock, self, denoiser).overrides(denoiser)

    def ratios(self) -> tuple[float, ...]:
        """One a step, 1 at the first: the mean over calls."""
        return (1.0, *(sum(self.found[i]) / len(self.found[i]) for i in sorted(self.found)))


class _Meter:
    def __init__(self, found: dict[int, list[float]]) -> None:
        self.found, self.step = found, 0
        self.last: Tensor | None = None

    def skips(self, seen: Tensor, step: int, steps: int) -> bool:
        self.step = step
        return False

    def computed(self, seen: Tensor, kept: Tensor) -> None:
        size = kept.float().norm(dim=-1 if kept.ndim == 3 else 1)  # of a token, or of a pixel
        if self.last is not None:
            ratio = float((size / self.last.clamp_min(1e-12)).mean())
            self.found.setdefault(self.step, []).append(ratio)
        self.last = size
