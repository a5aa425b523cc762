"""EasyCache (Zhou et al., arXiv 2507.02860): the change of the output, told from the input's.

Reference formula: k = mean |y_n - y_m| / mean |x_n - x_(n-1)| is measured at each computed step n
after m. At a step n the error grows by k * mean |x_n - x_(n-1)| / mean |y_m|; under the threshold
the output is x_n + (y_m - x_m), else it computes and the error is 0 again. The first steps and the
last one compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..model import Override
from ..sampling import Clock
from .at_run_time import Gate, RunTimeCalls


@dataclass(frozen=True)
class EasyCache:
    """Skip while the error is under `threshold`; `first` steps compute, and where `last` the last.

    residual: as published for flow matching; without it the output itself is reused,
    which is nearer where the model predicts v.
    """

    threshold: float = 0.05
    first: int = 5
    last: bool = True
    residual: bool = True

    name: ClassVar[str] = "easycache"
    computes: ClassVar[int | None] = None

    def gate(self) -> Gate:
        """A new one."""
        return _Gate(self)

    def apply_(self, denoiser: nn.Module, clock: Clock) -> list[Override]:
        """Put it on `denoiser`, which the clock follows."""
        return RunTimeCalls(clock, self, denoiser).overrides(denoiser)


class _Gate:
    def __init__(self, policy: EasyCache) -> None:
        self.policy, self.error, self.moved = policy, 0.0, 0.0
        self.rate: float | None = None
        self.sample: Tensor | None = None
        self.output: Tensor | None = None

    def skips(self, seen: Tensor, step: int, steps: int) -> bool:
        policy = self.policy
        if self.sample is not None:
            self.moved = float((seen - self.sample).abs().mean())
        self.sample = seen.clone()
        forced = step < policy.first or (policy.last and step >= steps - 1)
        if forced or self.rate is None or self.output is None:
            self.error = 0.0
            return False
        self.error += self.rate * self.moved / max(float(self.output.abs().mean()), 1e-12)
        if self.error < policy.threshold:
            return True
        self.error = 0.0
        return False

    def computed(self, seen: Tensor, kept: Tensor) -> None:
        channels = min(kept.shape[1], seen.shape[1])
        output = kept[:, :channels] + seen[:, :channels] if self.policy.residual else kept
        if self.output is not None and self.moved > 0:
            self.rate = float((output - self.output).abs().mean()) / self.moved
        self.output, self.sample = output.clone(), seen.clone()
