"""The values that each column of a weight may have, for algorithms that round column by column.

`columns_of(grid, columns)` gives those of a weight (N, K), in the basis in which it is rounded: of
equal distances (`Even`), or any (`Uneven`), in which every value is looked up. Both have

    at(which)                       the same of some columns: a slice, or an order
    rows(which)                     of some rows
    compensate(rest, inverse)       -> values, errors: see `kernels/column_rounding.py`
    descend(slope, gram, values)    -> values
    values(levels), levels(values)  (N, K) each, one of the other
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..numerics import Format, Grid, float8
from ..numerics.scheme import LEVELS
from ..runtime.kernels.column_rounding import compensate, descend


@dataclass(frozen=True)
class Even:
    """size, low, high: (N, K), the distance of values and the lowest and the highest level."""

    size: Tensor
    low: Tensor
    high: Tensor

    def at(self, which: Any) -> Even:
        """Of some columns."""
        return Even(self.size[:, which], self.low[:, which], self.high[:, which])

    def rows(self, which: slice) -> Even:
        """Of some rows."""
        return Even(self.size[which], self.low[which], self.high[which])

    def compensate(self, rest: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Values, and the error of each column over inverse[j, j]."""
        levels, errors = compensate(rest, inverse, self.size, self.low, self.high)
        return levels * self.size, errors

    def descend(self, slope: Tensor, gram: Tensor, values: Tensor) -> Tensor:
        """Values after every column, in turn, took the best one."""
        return descend(slope, gram, values, self.size, self.low, self.high)

    def values(self, levels: Tensor) -> Tensor:
        """What levels stand for."""
        return levels * self.size

    def levels(self, values: Tensor) -> Tensor:
        """The levels of values."""
        return (values / self.size).round()


@dataclass(frozen=True)
class Uneven:
    """scale: (N, 1). step: (N, K), the factor of a column, or (N, 1) where it has none."""

    scale: Tensor
    step: Tensor
    form: Format

    def at(self, which: Any) -> Uneven:
        """Of some columns."""
        return Uneven(self.scale, self.step[:, which], self.form)

    def rows(self, which: slice) -> Uneven:
        """Of some rows."""
        return Uneven(self.scale[which], self.step[which], self.form)

    def compensate(self, rest: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """As `kernels.column_rounding.compensate_reference`, with values for levels."""
        rest, near = rest.mT.contiguous(), self._near()
        values, errors, ends = torch.empty_like(rest), torch.empty_like(rest), _diagonal(inverse)
        for j, end in enumerate(ends):
            now = rest[j]
            if j:
                now = torch.addmv(now, errors[:j].mT, inverse[:j, j], alpha=-1)
            values[j] = new = near(j, now)
            torch.sub(now, new, out=errors[j]).div_(end)
        return values.mT, errors.mT

    def descend(self, slope: Tensor, gram: Tensor, values: Tensor) -> Tensor:
        """As `kernels.column_rounding.descend_reference`."""
        slope, found, near = slope.mT.contiguous(), values.mT.contiguous(), self._near()
        moved = torch.empty_like(found)
        for j, end in enumerate(_diagonal(gram)):
            now = slope[j]
            if j:
                now = torch.addmv(now, moved[:j].mT, gram[:j, j])
            new = near(j, torch.sub(found[j], now, alpha=1 / end))
            torch.sub(new, found[j], out=moved[j])
            found[j] = new
        return found.mT

    def _near(self) -> Callable[[int, Tensor], Tensor]:
        """A function that gives the values of a column's number that are nearest to it."""
        scale = self.scale[:, 0].contiguous()
        if self.form.dtype == "e4m3":
            return lambda j, x: float8.cast(x / scale).float().mul_(scale)
        kind = LEVELS[self.form.dtype]
        return kind.values_near(self.step.mT.contiguous(), scale, self.form.bits)

    def values(self, levels: Tensor) -> Tensor:
        """What levels stand for."""
        if self.form.dtype == "e4m3":
            return float8.values(levels) * self.scale
        return LEVELS[self.form.dtype].value(levels, self.step, self.scale, self.form.bits)

    def levels(self, values: Tensor) -> Tensor:
        """The levels of the values that are nearest."""
        if self.form.dtype == "e4m3":
            return float8.levels(values / self.scale)
        return LEVELS[self.form.dtype].nearest(values / self.scale, self.step, self.form.bits)


Columns = Even | Uneven


def _diagonal(square: Tensor) -> list[float]:
    return square.diagonal().tolist()


def columns_of(grid: Grid, columns: int) -> Columns:
    """The values of a weight (N, K) with K columns."""
    if grid.form.dtype == "int":
        return Even(grid.size(columns), *grid.limits(columns))
    if grid.step is None:
        return Uneven(grid.scale[:, None], torch.ones_like(grid.scale)[:, None].expand(-1, columns),
                      grid.form)  # fmt: skip
    return Uneven(grid.scale[:, None], grid.spread(grid.step, columns), grid.form)
