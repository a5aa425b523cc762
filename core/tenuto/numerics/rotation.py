"""The regular Hadamard rotation of input channels, in groups of r (ConvRot).

H_4 = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] / 2, and H_r is a Kronecker power
of it: symmetric, its own inverse, and all sums of its rows are equal. A weight W (N, K) is kept as
V = W diag(H_r, ..., H_r); the inputs are rotated alike, and x W^T = (x diag(H_r, ...)) V^T.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

SIZES = (256, 64, 16)  # of the groups that are used, the first that divides K
PIECE = 2**16  # numbers at a time: what a cache holds


def size_for(columns: int) -> int:
    """The size of the groups of so many columns; 0: none divides them, and nothing is rotated."""
    return next((size for size in SIZES if columns % size == 0), 0)


def matrix(size: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """H_r (r, r); r a power of 4. It is kept: not to be written to."""
    return _matrix(size, str(device), dtype)


@functools.cache
def _matrix(size: int, device: str, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # or it could not be used where there are gradients
        return butterfly(torch.eye(size)).to(device, dtype)


def rotated(x: Tensor, size: int) -> Tensor:
    """`x` (..., K) in the other basis, by a product with H_r as readers of files compute it.

    size: r, which divides K; 0: `x` itself.
    """
    if not size:
        return x
    return (x.unflatten(-1, (-1, size)) @ matrix(size, x.device, x.dtype)).flatten(-2)


def butterfly(x: Tensor, size: int | None = None) -> Tensor:
    """`rotated` by sums of four at a time, in fp32: alike on every device, and in graphs.

    size: None: of all columns.
    """
    size = x.shape[-1] if size is None else size
    if not size:
        return x.float()
    if x.device.type != "cpu" or x.numel() <= PIECE:
        return _butterfly(x, size)
    rows = x.reshape(-1, size)
    found = torch.empty(rows.shape, dtype=torch.float32)
    for some, out in zip(rows.split(PIECE // size), found.split(PIECE // size), strict=True):
        out.copy_(_butterfly(some, size))
    return found.view(x.shape)


def _butterfly(x: Tensor, size: int) -> Tensor:
    y = x.float().unflatten(-1, (-1, *[4] * digits(size)))
    for place in range(digits(size)):
        a, b, c, d = y.unbind(-1 - place)
        half = ((a + b) + (c + d)) * 0.5
        y = torch.stack((half - d, half - c, half - b, half - a), -1 - place)
    return y.reshape(x.shape)


def digits(size: int) -> int:
    """How many digits to base 4; ValueError where `size` is no power of 4 from 4 on."""
    found = (size.bit_length() - 1) // 2
    if size < 4 or 4**found != size:
        raise ValueError(f"a rotation of {size} columns")
    return found


def both(moments: Tensor, size: int) -> Tensor:
    """Second moments x^T x (..., K, K) of the inputs that `size` rotates."""
    if not size:
        return moments
    found = rotated(moments, size).unflatten(-2, (-1, size))
    return (matrix(size, found.device, found.dtype) @ found).flatten(-3, -2)
