"""`columns.py` on CUDA: some rows of a tile in registers, its columns one after another.

A program needs no other program's rows. It reads a row of the square matrix a column; a column of
the tile is taken out of the registers by a sum over a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # of a tile in one program: weights have hundreds of rows, a GPU has a hundred processors


@triton.jit
def _rounded(x):
    """To nearest, ties to even, as torch rounds: adding 1.5 * 2^23 leaves no room for fractions."""
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)


@triton.jit
def _compensate(
    rest_ptr, inverse_ptr, size_ptr, low_ptr, high_ptr, level_ptr, error_ptr,
    n, w, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDE)
    inside = (rows < n)[:, None] & (columns < w)[None, :]
    rest = tl.load(rest_ptr + rows[:, None] * w + columns[None, :], mask=inside, other=0.0)
    for j in range(w):
        here = columns[None, :] == j
        x = tl.sum(tl.where(here, rest, 0.0), 1)
        at, there = rows * w + j, rows < n
        size = tl.load(size_ptr + at, mask=there, other=1.0)
        low = tl.load(low_ptr + at, mask=there, other=0.0)
        high = tl.load(high_ptr + at, mask=there, other=0.0)
        level = tl.minimum(tl.maximum(_rounded(tl.div_rn(x, size)), low), high)
        row = tl.load(inverse_ptr + j * w + columns, mask=columns < w, other=0.0)
        error = tl.div_rn(x - level * size, tl.load(inverse_ptr + j * w + j) + x * 0.0)
        rest -= error[:, None] * tl.where(columns >= j, row, 0.0)[None, :]
        tl.store(level_ptr + at, level, mask=there)
        tl.store(error_ptr + at, error, mask=there)


@triton.jit
def _descend(
    slope_ptr, gram_ptr, value_ptr, size_ptr, low_ptr, high_ptr, out_ptr,
    n, w, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDE)
    inside = (rows < n)[:, None] & (columns < w)[None, :]
    slope = tl.load(slope_ptr + rows[:, None] * w + columns[None, :], mask=inside, other=0.0)
    for j in range(w):
        here = columns[None, :] == j
        near = tl.sum(tl.where(here, slope, 0.0), 1)
        at, there = rows * w + j, rows < n
        size = tl.load(size_ptr + at, mask=there, other=1.0)
        low = tl.load(low_ptr + at, mask=there, other=0.0)
        high = tl.load(high_ptr + at, mask=there, other=0.0)
        value = tl.load(value_ptr + at, mask=there, other=0.0)
        curve = tl.load(gram_ptr + j * w + j) + near * 0.0
        best = tl.div_rn(value - tl.div_rn(near, curve), size)
        new = tl.minimum(tl.maximum(_rounded(best), low), high) * size
        row = tl.load(gram_ptr + j * w + columns, mask=columns < w, other=0.0)
        slope += (new - value)[:, None] * row[None, :]
        tl.store(out_ptr + at, new, mask=there)


def compensate(
    rest: Tensor, inverse: Tensor, size: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """As `columns.compensate`."""
    levels, errors = (torch.empty(rest.shape, device=rest.device) for _ in range(2))
    _launch(_compensate, [rest, inverse, size, low, high], [levels, errors])
    return levels, errors


def descend(
    slope: Tensor, gram: Tensor, values: Tensor, size: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """As `columns.descend`."""
    found = torch.empty(slope.shape, device=slope.device)
    _launch(_descend, [slope, gram, values, size, low, high], [found])
    return found


def _launch(kernel: triton.JITFunction, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """One program for every `ROWS` rows; fp32, rows one after another in memory."""
    n, w = inputs[0].shape
    given = [x.float().contiguous() for x in inputs]
    grid = (triton.cdiv(n, ROWS),)
    kernel[grid](*given, *outputs, n, w, ROWS=ROWS, WIDE=triton.next_power_of_2(w), num_warps=4)
