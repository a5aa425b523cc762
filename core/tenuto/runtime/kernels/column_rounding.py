"""Round a weight column after column, each in the light of what the ones before it left over.

The inner loops of GPTQ and of cyclic descent (`algorithms/gptq.py`), over a tile of columns. Rows
do not know of each other, columns wait for each other: on CUDA a program keeps some rows of the
tile in registers (`columns_triton.py`), where eager code would start ten kernels a column.

Shapes: tiles (N, W) fp32; `size`, `low`, `high` (N, W), see `grid.Grid`; the square ones (W, W).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .trial import works


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
    """Whether the fused kernels work where `x` is."""
    return x.device.type == "cuda" and works("GPTQ", x.device.index, columns_are_right)


def columns_are_right(device: torch.device) -> bool:
    """Whether a fused kernel rounds a small tile on `device`; errors of Triton are raised."""
    from .column_rounding_triton import compensate as fused

    level = torch.tensor([[3.0, -2.0], [1.0, 7.0]], device=device)
    inverse = torch.tensor([[1.0, -1.0], [0.0, 1.0]], device=device)
    one, more = torch.ones_like(level), torch.tensor([0.0, 1.0], device=device)
    # 3/8 are left of the first column, and go to the 3/8 of the second: one level more
    levels, _ = fused(level + 0.375, inverse, one, -9 * one, 9 * one)
    return bool((levels == level + more).all())


def compensate_reference(
    rest: Tensor, inverse: Tensor, size: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """`compensate` in eager operations; a column of a tile lies in one piece here."""
    rest, size, low, high = (x.mT.contiguous() for x in (rest, size, low, high))
    levels, errors = torch.empty_like(rest), torch.empty_like(rest)
    for j in range(len(rest)):
        now = torch.addmv(rest[j], errors[:j].mT, inverse[:j, j], alpha=-1) if j else rest[j]
        levels[j] = level = _whole((now / size[j]).clamp_(low[j], high[j]))
        errors[j] = (now - level * size[j]) / inverse[j, j]
    return levels.mT, errors.mT


def descend_reference(
    slope: Tensor, gram: Tensor, values: Tensor, size: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """`descend` in eager operations; a column of a tile lies in one piece here."""
    slope, size, low, high = (x.mT.contiguous() for x in (slope, size, low, high))
    found = values.mT.contiguous()
    moved = torch.empty_like(found)
    for j in range(len(found)):
        now = torch.addmv(slope[j], moved[:j].mT, gram[:j, j]) if j else slope[j]
        best = (found[j] - now / gram[j, j]) / size[j]
        new = _whole(best.clamp_(low[j], high[j])) * size[j]
        moved[j] = new - found[j]
        found[j] = new
    return found.mT


def _whole(x: Tensor) -> Tensor:
    """`x.round_()` of |x| < 2^22, without the threads that torch asks for it, column by column."""
    return x.add_(12582912.0).sub_(12582912.0)  # 1.5 * 2^23 leaves no room for fractions
