"""Round a weight column after column, each in the light of what the ones before it left over.

The inner loops of GPTQ and of cyclic descent (`algorithms/gptq.py`), over a tile of columns. Rows
do not know of each other, columns wait for each other: on CUDA a program keeps some rows of the
tile in registers (`columns_triton.py`), where eager code would start ten kernels a column.

Shapes: tiles (N, W) fp32; `size`, `low`, `high` (N, W), see `grid.Grid`; the square ones (W, W).
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def compensate(
    rest: Tensor, inverse: Tensor, size: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Levels of a tile of weights, and the error of each column over inverse[j, j].

    inverse: upper triangular. Column j is rounded, and its error times inverse[j, k] leaves k > j.
    """
    if supported(rest):
        from .column_rounding_triton import compensate as fused

        return fused(rest, inverse, size, low, high)
    return compensate_reference(rest, inverse, size, low, high)


def descend(
    slope: Tensor, gram: Tensor, values: Tensor, size: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Values of a tile after every column, in turn, took the best one.

    slope: half the gradient of the squared error. gram: the second moments of the tile's inputs.
    """
    if supported(slope):
        from .column_rounding_triton import descend as fused

        return fused(slope, gram, values, size, low, high)
    return descend_reference(slope, gram, values, size, low, high)


def supported(x: Tensor) -> bool:
    """Whether the fused kernels run where `x` is."""
    return x.device.type == "cuda" and _triton()


@functools.cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def compensate_reference(
    rest: Tensor, inverse: Tensor, size: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """`compensate` in eager operations."""
    rest, levels, errors = rest.clone(), torch.empty_like(rest), torch.empty_like(rest)
    for j in range(rest.shape[1]):
        one = slice(j, j + 1)
        level = (rest[:, one] / size[:, one]).round().clamp(low[:, one], high[:, one])
        error = (rest[:, one] - level * size[:, one]) / inverse[j, j]
        levels[:, one], errors[:, one] = level, error
        rest[:, j:] -= error * inverse[one, j:]
    return levels, errors


def descend_reference(
    slope: Tensor, gram: Tensor, values: Tensor, size: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """`descend` in eager operations."""
    slope, values = slope.clone(), values.clone()
    for j in range(slope.shape[1]):
        one = slice(j, j + 1)
        best = (values[:, one] - slope[:, one] / gram[j, j]) / size[:, one]
        new = best.round().clamp(low[:, one], high[:, one]) * size[:, one]
        slope += (new - values[:, one]) * gram[one]
        values[:, one] = new
    return values
