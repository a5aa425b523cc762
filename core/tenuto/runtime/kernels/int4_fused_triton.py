"""Codes of 4 bits as int8 codes of their row, on CUDA in one pass: what the int8 product takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles_triton import start

BYTES = 1024  # of a program: columns side by side of one row


@triton.jit
def _unpack(
    packed_ptr, zero_ptr, step_ptr, out_ptr, columns, bytes, groups,
    BYTES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    both = tl.load(packed_ptr + row * bytes + at, mask=at < bytes, other=0)
    low, high = (both & 15).to(tl.int32), (both >> 4).to(tl.int32)
    if GROUP > 0:
        of_low = row * groups + 2 * at // GROUP  # a group has an even number of columns
        zero = tl.load(zero_ptr + of_low, mask=at < bytes, other=0).to(tl.int32)
        step = tl.load(step_ptr + of_low, mask=at < bytes, other=0).to(tl.int32)
        low, high = (low - zero) * step, (high - zero) * step
    else:
        zero = tl.load(zero_ptr + row).to(tl.int32)
        low, high = low - zero, high - zero
    codes = tl.interleave(low.to(tl.int8), high.to(tl.int8))
    column = tl.program_id(1) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + row * columns + column, codes, mask=column < columns)


def unpacked(packed: Tensor, zero: Tensor, step: Tensor | None, columns: int, group: int) -> Tensor:
    """int8 (N, K) of two codes a byte, low half first: uint8 (N, ceil(K / 2)).

    zero, step: uint8 (N, G) of groups of `group` columns; zero (N,) and no step where rows have one
    range. K: `columns`.
    """
    rows, size = packed.shape
    out = torch.empty((rows, columns), dtype=torch.int8, device=packed.device)
    start(
        _unpack, (rows, triton.cdiv(size, BYTES)), packed,
        packed, zero, step, out, columns, size, zero.shape[-1], BYTES=BYTES,
        GROUP=group if step is not None else 0, num_warps=4,
    )  # fmt: skip
    return out
