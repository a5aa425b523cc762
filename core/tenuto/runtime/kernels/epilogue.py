"""From the product of codes to a layer's output: the input's scale, the bias, the dtype.

Ranges a token cannot go into the operators, which take one scale. Products in fp32 that are to be
rounded are finished a piece at a time, so that no large one is ever allocated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .quantize_input import compiling

PIECE = 2**20  # elements of a product: 4 MiB


def finished(y: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * y + bias in `dtype`, from a product that nobody else holds; fp32 sums.

    bias: as it broadcasts to `y`, fp32 or None.
    """
    if compiling():
        return (y * scale if bias is None else y * scale + bias).to(dtype)
    if bias is None:
        return y.mul_(scale).to(dtype)
    return torch.addcmul(bias, y, scale, out=y).to(dtype)


def in_pieces(
    product: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    scale: Tensor,
    width: int,
    dtype: torch.dtype,
    form: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """product(x, scale) by rows of `x`, laid out as `form`; width: elements of one row of it.

    scale: one element, or a row for each of `x`. The product is in `dtype`.
    """
    step = max(1, PIECE // width)
    if dtype is torch.float32 or len(x) <= step or x.device.type != "cpu":
        return product(x, scale).contiguous(memory_format=form)
    found: Tensor | None = None
    scales = scale.expand(len(x), *scale.shape[1:]).split(step)
    for start, some, their in zip(range(0, len(x), step), x.split(step), scales, strict=True):
        y = product(some, their)
        if found is None:
            shape = (len(x), *y.shape[1:])
            found = torch.empty(shape, dtype=dtype, device=x.device, memory_format=form)
        found[start : start + step] = y
    assert found is not None
    return found
