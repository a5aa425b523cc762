"""The product of int8 codes on CUDA with all that follows in the same kernel, on tensor cores.

out = (x - zero) @ weight.T * row scale * column scale + bias. Sums are of 32 bits, the rest is
fp32, rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles_triton import Tiles, bucket, chosen, start

FEW = 64  # rows: the product waits for the weight, not for the tensor cores
NARROW = (
    Tiles(16, 64, 256), Tiles(16, 32, 256, stages=5), Tiles(16, 128, 128), Tiles(32, 64, 256),
    Tiles(64, 64, 128),
)  # fmt: skip
HOPPER = (
    Tiles(128, 128, 128, 8), Tiles(128, 256, 128, 8, 3), Tiles(128, 256, 128, 8, 4, tma=True),
    Tiles(128, 256, 128, 8, 3, tma=True, persistent=True),
    Tiles(128, 128, 128, 8, 4, tma=True, persistent=True), Tiles(128, 128, 128, 4, 3, tma=True),
    Tiles(64, 128, 128, 4, 4), Tiles(128, 64, 128, 4, 4), Tiles(64, 64, 128, 4, 4),
)  # fmt: skip
OTHERS = (
    Tiles(128, 128, 64, 4), Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 128, 8, 3),
    Tiles(64, 128, 64), Tiles(128, 64, 64), Tiles(64, 64, 128, 4, 3),
)  # fmt: skip


@triton.jit
def _product(
    x, weight, out, row_ptr, column_ptr, sums_ptr, zero_ptr, bias_ptr, m, n, k,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr,
    ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    STORE: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(m, M), tl.cdiv(n, N)
    every = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), down * across, every, flatten=PERSISTENT):  # pyright: ignore
        first = tile // (GROUP * across) * GROUP
        high = min(down - first, GROUP)
        row = (first + tile % (GROUP * across) % high) * M
        column = tile % (GROUP * across) // high * N
        total = _sums(x, weight, row, column, m, n, k, M, N, K, EVEN, TMA)
        rows, columns = row + tl.arange(0, M), column + tl.arange(0, N)
        there, inside = rows < m, columns < n
        if ZERO:
            sums = tl.load(sums_ptr + columns, mask=inside, other=0)
            total -= (tl.load(zero_ptr) - 128) * sums[None, :]
        y = total.to(tl.float32) * tl.load(column_ptr + columns, mask=inside, other=0.0)[None, :]
        if PER_ROW:
            y *= tl.load(row_ptr + rows, mask=there, other=0.0)[:, None]
        else:
            y *= tl.load(row_ptr)
        if BIAS:
            y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if STORE:
            out.store([row, column], y.to(out.dtype))
        else:
            at = rows.to(tl.int64)[:, None] * n + columns[None, :]
            both = there[:, None] & inside[None, :]
            tl.store(out + at, y.to(out.dtype.element_ty), mask=both)


@triton.jit
def _sums(
    x, weight, row, column, m, n, k,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """int32 (M, N): rows and columns beyond the ends are of no use, and those from the start."""
    total = tl.zeros((M, N), tl.int32)
    if TMA:
        for step in range(tl.cdiv(k, K)):
            a, b = x.load([row, step * K]), weight.load([column, step * K])
            total = tl.dot(a, b.T, total, out_dtype=tl.int32)
    else:
        depth = tl.arange(0, K)
        rows = ((row + tl.arange(0, M)) % m).to(tl.int64)
        columns = ((column + tl.arange(0, N)) % n).to(tl.int64)
        x_at = x + rows[:, None] * k + depth[None, :]
        weight_at = weight + columns[:, None] * k + depth[None, :]
        for step in range(tl.cdiv(k, K)):
            if EVEN:
                a, b = tl.load(x_at), tl.load(weight_at)
            else:
                left = (depth < k - step * K)[None, :]
                a, b = tl.load(x_at, mask=left, other=0), tl.load(weight_at, mask=left, other=0)
            total = tl.dot(a, b.T, total, out_dtype=tl.int32)
            x_at += K
            weight_at += K
    return total


def linear(
    x: Tensor,
    x_scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    """The operation in `dtype`, (M, N), from int8 codes less 128: x (M, K), weight (N, K).

    x_scale: fp32, one element or (M, 1). zero: int32 (1,), None for 128. w_scale fp32 and sums
    int32 (N,): the latter of the weight's rows. bias (N,), of any float type. tiles: these,
    and none are tried.
    """
    (m, k), n = x.shape, len(weight)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    bias = None if bias is None else bias.contiguous()
    x, weight, x_scale = (t.contiguous() for t in (x, weight, x_scale))
    given = x, weight, x_scale, w_scale, sums, zero, bias, out
    if tiles is None:
        some = candidates(m, k, x.device, all(t.data_ptr() % 16 == 0 for t in (x, weight)))
        kind = (bucket(m), n, k, str(dtype), len(some))
        tiles = chosen(_product, kind, some, x.device, lambda t: _launch(t, *given))
    _launch(tiles, *given)
    return out


def candidates(m: int, k: int, device: torch.device, aligned: bool = True) -> tuple[Tiles, ...]:
    """The tiles that are worth trying for so many rows, the safe ones first.

    aligned: whether matrices start at multiples of 16 bytes, as the copy engine needs it.
    """
    if m <= FEW:
        return NARROW
    if not has_copy_engine(device):
        return OTHERS
    return tuple(tiles for tiles in HOPPER if not tiles.tma or (aligned and k % 16 == 0))


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    """Whether a card copies tiles by an engine, and has the shared memory that `HOPPER` takes."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _launch(
    tiles: Tiles, x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, sums: Tensor,
    zero: Any, bias: Any, out: Tensor,
) -> None:  # fmt: skip
    (m, k), n = x.shape, len(weight)
    programs = triton.cdiv(m, tiles.m) * triton.cdiv(n, tiles.n)
    if tiles.persistent:
        programs = min(programs, processors(x.device))
    store = tiles.tma and tiles.persistent and out.element_size() == 2 and n % 8 == 0
    operands: tuple[Any, ...] = x, weight
    if tiles.tma:
        sides = zip((x, weight), (tiles.m, tiles.n), strict=True)
        operands = tuple(TensorDescriptor.from_tensor(t, [side, tiles.k]) for t, side in sides)
    target = TensorDescriptor.from_tensor(out, [tiles.m, tiles.n]) if store else out
    start(
        _product, (programs,), x,
        *operands, target, x_scale, w_scale, sums, zero, bias, m, n, k,
        M=tiles.m, N=tiles.n, K=tiles.k, GROUP=tiles.group, PER_ROW=x_scale.numel() > 1,
        ZERO=zero is not None, BIAS=bias is not None, EVEN=k % tiles.k == 0, TMA=tiles.tma,
        STORE=store, PERSISTENT=tiles.persistent, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a card has; a few elsewhere."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
