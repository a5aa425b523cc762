"""DeepCache (Ma et al., arXiv 2312.00858): of a U-Net only the outermost layers are computed.

Reference formula: at a skipped step the layers 0..depth-1 of the first down block and the last
depth + 1 of the last up block are computed, on what the up block's layer before them returned at
the last computed step; all that lies deeper is reused. One of every period is computed ("uniform").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..errors import ModelError
from .budget import whole_steps
from .interval import LateInterval, late_interval_for
from .policy import Facts
from .schedule import CacheSchedule


@dataclass(frozen=True)
class DeepCache:
    """`first` steps computed (1 as published), then one of `period`; depth: of what always is."""

    first: int = 1
    period: int = 3
    depth: int = 0

    name: ClassVar[str] = "deepcache"
    candidate: ClassVar[bool] = False  # its branches are others than a search's

    def __call__(self, timesteps: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        """The schedule of what is deeper (`branches_of`) at these steps."""
        return LateInterval(self.first, self.period)(timesteps, branches)

    @property
    def label(self) -> str:
        """As a search lists it."""
        return f"{self.name} depth {self.depth} {self.first}/{self.period}"

    def branches_of(self, denoiser: nn.Module) -> tuple[str, ...]:
        """What is reused: every module deeper than `depth`; ModelError where it is no U-Net."""
        model: Any = denoiser
        if not all(hasattr(model, part) for part in ("down_blocks", "mid_block", "up_blocks")):
            raise ModelError(f"DeepCache is for U-Nets, not for a {type(denoiser).__name__}.")
        first, last = model.down_blocks[0], model.up_blocks[-1]
        if not 0 <= self.depth < len(last.resnets) - 1:
            raise ModelError(f"The outermost block of the U-Net has no depth {self.depth}.")
        if self.depth == 0:
            found = ["down_blocks.0"]  # nothing of it is computed: its outputs are reused as one
        else:
            found = _layers("down_blocks.0", first, range(self.depth, len(first.resnets)))
            found += [
                f"down_blocks.0.downsamplers.{i}" for i in range(len(first.downsamplers or ()))
            ]
        found += [f"down_blocks.{i}" for i in range(1, len(model.down_blocks))]
        found += ["mid_block", *(f"up_blocks.{i}" for i in range(len(model.up_blocks) - 1))]
        name, inside = f"up_blocks.{len(model.up_blocks) - 1}", len(last.resnets) - self.depth - 1
        return tuple(found + _layers(name, last, range(inside)))

    @classmethod
    def for_share(cls, share: float, facts: Facts, depth: int = 0) -> list[DeepCache]:
        """Every one that skips `share` of the steps, as near in whole steps as any."""
        whole = whole_steps(share, len(facts.timesteps))
        found = late_interval_for(whole, facts.timesteps, facts.branches)
        return [cls(late.first, late.period, depth) for late in found]


def _layers(name: str, block: Any, places: Sequence[int]) -> list[str]:
    kinds = [kind for kind in ("resnets", "attentions") if len(getattr(block, kind, ()) or ())]
    return [f"{name}.{kind}.{i}" for i in places for kind in kinds]
