"""The grid of a quantized weight: which values its codes stand for.

A range is that of a whole row,
    value = scale[n] * (code - zero[n]),
or that of a group of columns, in two levels, so that every value is an 8-bit code of its row too
and the integer kernels need not know of groups (QServe, arXiv 2405.04532; LLMC):
    value = scale[n] * step[n, g] * (code - zero[n, g]),   |step * (code - zero)| <= 127.
A *level* is code - zero: signed, whole, between `limits`. The values of an 8-bit float lie at
unequal distances,
    value = scale[n] * float8.values(level),
and so do those of the dtypes in `scheme.LEVELS`, whose groups of columns have e4m3 steps,
    value = scale[n] * number(level, step[n, g]).
A rotated format has all of this of the rotated weight, see `rotation.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from . import float8, group_steps
from .integer_codes import RANGES, affine, code_limits, row_range
from .rotation import butterfly, size_for
from .scheme import LEVELS, Format

WIDEST = 127  # of an 8-bit code


@dataclass(frozen=True)
class Grid:
    """The grid of a weight (N, K) with G ranges a row.

    scale: fp32 (N,). zero: whole fp32 (N, G). step: whole fp32 (N, G), or None where G is 1; of the
    dtypes in `scheme.LEVELS` e4m3 numbers.
    """

    scale: Tensor
    zero: Tensor
    step: Tensor | None
    form: Format

    @staticmethod
    def of(weight: Tensor, form: Format) -> Grid:
        """The grid of a weight (N, ...) as its format searches it."""
        check_shape(weight.shape, form)
        rows, search = rows_of(weight, form), RANGES[form.ranges]
        if form.dtype in LEVELS:
            scale, step = group_steps.found(rows, form, LEVELS[form.dtype])
            return Grid(scale, torch.zeros_like(step), step, form)
        if form.dtype == "e4m3":
            scale, zero = float8.covering(*row_range(rows))
            if form.granularity == "tensor":
                scale = scale.amax().expand_as(scale).contiguous()
            return Grid(scale, zero[:, None], None, form)
        if not form.group:
            scale, zero = search(rows, form.bits, form.symmetric)
            return Grid(scale, zero[:, None], None, form)
        short = -rows.shape[1] % form.group
        groups = torch.nn.functional.pad(rows, (0, short)).view(-1, form.group)
        wanted, zero = search(groups, form.bits, form.symmetric)
        return Grid.fitting(wanted.view(len(rows), -1), zero.view(len(rows), -1), form)

    @staticmethod
    def fitting(size: Tensor, zero: Tensor, form: Format) -> Grid:
        """The grid of whole codes whose ranges are nearest to what is wanted.

        size: the distance of neighbouring values, fp32 (N, G). zero: whole fp32 (N, G). Groups get
        whole multiples of their row's scale, which is as fine as the widest of them allows.
        """
        if not form.group:
            return Grid(size[:, 0].contiguous(), zero, None, form)
        low, high = code_limits(form.bits, form.symmetric)
        farthest = torch.maximum(zero - low, high - zero)
        scale = (size * farthest).amax(1) / WIDEST
        step = (size / scale[:, None]).round().clamp_min(1)
        return Grid(scale, zero, torch.minimum(step, (WIDEST / farthest).floor()), form)

    def spread(self, values: Tensor, columns: int) -> Tensor:
        """(N, G) of every range as (N, K) of every column; a view where there is one range."""
        return spread(values, self.form.group, columns)

    def size(self, columns: int) -> Tensor:
        """The distance of neighbouring values, (N, K). SchemeError where they are unequal."""
        if self.form.dtype != "int":
            said = "has unequal steps: round it to nearest or by GPTQ"
            raise SchemeError(f"A format {self.form.dtype} {said}.")
        if self.step is None:
            return self.scale[:, None].expand(-1, columns)
        return self.spread(self.step * self.scale[:, None], columns)

    def limits(self, columns: int) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level of every column, (N, K) each."""
        if self.form.dtype == "e4m3":
            low, high = -float8.HIGHEST, float8.HIGHEST
        else:
            low, high = code_limits(self.form.bits, self.form.symmetric)
        return self.spread(low - self.zero, columns), self.spread(high - self.zero, columns)

    def nearest(self, weight: Tensor) -> Tensor:
        """Levels (N, ...) of the values nearest to `weight` (N, ...)."""
        rows, form = rows_of(weight, self.form), self.form
        if form.dtype in LEVELS:
            assert self.step is not None
            found = group_steps.nearest(rows, self.scale, self.step, form, LEVELS[form.dtype])
            return found.view(weight.shape)
        if self.form.dtype == "e4m3":
            return float8.levels(rows / self.scale[:, None]).view(weight.shape)
        columns = rows.shape[1]
        levels = (rows / self.size(columns)).round_()
        return levels.clamp_(*self.limits(columns)).view(weight.shape)


def fits(shape: Any, form: Format) -> bool:
    """Whether a weight of `shape` can be kept in `form`."""
    if form.rotate or form.dtype in LEVELS:
        if len(shape) != 2:
            return False
        if form.dtype in LEVELS:
            return LEVELS[form.dtype].fits(shape[1], form.bits, form.group)
    return True


def check_shape(shape: Any, form: Format) -> None:
    """SchemeError unless a weight of `shape` can be kept in `form`."""
    if not fits(shape, form):
        size = " x ".join(map(str, shape))
        raise SchemeError(f"A weight of {size} has no codes in {form.dtype} of {form.bits} bits.")


def rows_of(weight: Tensor, form: Format) -> Tensor:
    """A weight (N, ...) as fp32 rows (N, K), rotated where its format is."""
    rows = weight.detach().float().flatten(1)
    return butterfly(rows, size_for(rows.shape[1])) if form.rotate else rows


def spread(values: Tensor, group: int, columns: int) -> Tensor:
    """(N, G) of every range as (N, K) of every column; G is 1 where `group` is 0."""
    if not group:
        return values.expand(-1, columns)
    return values.repeat_interleave(group, 1)[:, :columns]


def covering(low: Tensor, high: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point of activations in [low, high]."""
    if form.dtype == "e4m3":
        return float8.covering(low, high)
    return affine(low, high, form.bits, form.symmetric)


def ends(form: Format) -> tuple[float, float]:
    """The smallest and the largest number that the scale of activations multiplies."""
    if form.dtype == "e4m3":
        return -float8.MOST, float8.MOST
    return code_limits(form.bits, form.symmetric)
