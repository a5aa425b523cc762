"""Round to nearest: the baseline that every other algorithm must beat or equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ...numerics import Format, QTensor, Scheme


def weight_of(block: nn.Module, name: str) -> Tensor:
    """The weight of the Linear or Conv2d called `name` inside `block`."""
    layer: Any = block.get_submodule(name)
    return layer.weight


@dataclass(frozen=True)
class RoundToNearest:
    """The nearest value of the grid: no data needed."""

    name: ClassVar[str] = "nearest"
    aliases: ClassVar[tuple[str, ...]] = ("rtn",)
    needs_inputs = False

    def __call__(
        self,
        block: nn.Module,
        layers: dict[str, Scheme],
        bank: Any = None,
        target: Tensor | None = None,
        *,
        seed: int = 0,
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> dict[str, QTensor]:
        """The weights of `layers` at the nearest codes."""
        return {n: self.weight(weight_of(block, n), s.weight) for n, s in layers.items()}

    def weight(self, weight: Tensor, form: Format) -> QTensor:
        """One weight (N, ...) at the nearest codes."""
        return QTensor.nearest(weight, form)
