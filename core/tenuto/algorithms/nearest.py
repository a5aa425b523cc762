"""Round to nearest: the baseline that every other algorithm must beat or equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..numerics import RANGES, code_limits, quantize
from ..qtensor import QTensor
from ..scheme import Format, Scheme


def weight_range(weight: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point (N,) of a weight (N, ...) as its format searches them."""
    return RANGES[form.ranges](weight.detach().float().flatten(1), form.bits, form.symmetric)


def weight_of(block: nn.Module, name: str) -> Tensor:
    """The weight of the Linear or Conv2d called `name` inside `block`."""
    layer: Any = block.get_submodule(name)
    return layer.weight


def rows_as(x: Tensor, weight: Tensor) -> Tensor:
    """(N,) shaped to broadcast over the rows of `weight` (N, ...)."""
    return x.view(-1, *[1] * (weight.ndim - 1))


@dataclass(frozen=True)
class RoundToNearest:
    """codes = clip(round(w / s) + z): no data needed."""

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
        w = weight.detach().float()
        scale, zero = weight_range(w, form)
        low, high = code_limits(form.bits, form.symmetric)
        codes = quantize(w, rows_as(scale, w), rows_as(zero, w), low, high)
        return QTensor.from_codes(codes, scale, zero, form.bits, form.symmetric)
