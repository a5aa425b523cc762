"""First-block cache (ParaAttention's FBCache, of TeaCache, arXiv 2411.19108): a threshold on it.

Reference formula: the first block is computed at every step and adds a to its input; with a' what
it added at the last computed step, the rest is skipped where mean |a - a'| / mean |a'| < threshold,
and what the other blocks added then is added again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..model import Override
from ..sampling import Clock
from .at_run_time import Gate, RunTimeCalls, relative


@dataclass(frozen=True)
class FirstBlock:
    """Skip under `threshold`; the first `first` steps compute (1 as published).

    residual: of a model without a chain of blocks, whether outputs are kept less the sample.
    """

    threshold: float = 0.08
    first: int = 1
    residual: bool = False

    name: ClassVar[str] = "first block"
    computes: ClassVar[int | None] = 1

    def gate(self) -> Gate:
        """A new one."""
        return _Gate(self)

    def apply_(self, denoiser: nn.Module, clock: Clock) -> list[Override]:
        """Put it on `denoiser`, which the clock follows."""
        return RunTimeCalls(clock, self, denoiser).overrides(denoiser)


class _Gate:
    def __init__(self, policy: FirstBlock) -> None:
        self.policy = policy
        self.last: Tensor | None = None

    def skips(self, seen: Tensor, step: int, steps: int) -> bool:
        if self.last is None or step < self.policy.first:
            return False
        return relative(seen, self.last) < self.policy.threshold

    def computed(self, seen: Tensor, kept: Tensor) -> None:
        self.last = seen.clone()
