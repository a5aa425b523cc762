"""The product of 8-bit codes on CUDA with all that follows in the same kernel, on tensor cores.

out = (x - zero) @ weight.T * row scale * column scale + bias, and of that residual + gate * out if
these are given. Sums of whole codes are of 32 bits, the rest is fp32, rounded once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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
    x, weight, out, row_ptr, column_ptr, sums_ptr, zero_ptr, bias_ptr, gate_ptr, residual_ptr,
    m, n, k, each, gate_stride, residual_stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr,
    ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    STORE: tl.constexpr, PERSISTENT: tl.constexpr, WHOLE: tl.constexpr, GATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(m, M), tl.cdiv(n, N)
    every = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), down * across, every, flatten=PERSISTENT):  # pyright: ignore
        first = tile // (GROUP * across) * GROUP
        high = min(down - first, GROUP)
        row = (first + tile % (GROUP * across) % high) * M
        column = tile % (GROUP * across) // high * N
        total = _sums(x, weight, row, column, m, n, k, M, N, K, EVEN, TMA, WHOLE)
        rows, columns = row + tl.arange(0, M), column + tl.arange(0, N)
        there, inside = rows < m, columns < n
        y = scaled(
            total, rows, columns, there, inside, row_ptr, column_ptr, sums_ptr, zero_ptr, bias_ptr,
            PER_ROW, ZERO, BIAS,
        )  # fmt: skip
        both = there[:, None] & inside[None, :]
        if GATE == "row":  # a tile is of one image: fewer registers
            place = gate_ptr + (row // each).to(tl.int64) * gate_stride + columns
            y *= tl.load(place, mask=inside, other=0.0).to(tl.float32)[None, :]
        elif GATE == "rows":
            image = (rows // each).to(tl.int64)[:, None] * gate_stride
            y *= tl.load(gate_ptr + image + columns[None, :], mask=both, other=0.0).to(tl.float32)
        if RESIDUAL:
            far = rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
            y += tl.load(residual_ptr + far, mask=both, other=0.0).to(tl.float32)
        if STORE:
            out.store([row, column], y.to(out.dtype))
        else:
            at = rows.to(tl.int64)[:, None] * n + columns[None, :]
            tl.store(out + at, y.to(out.dtype.element_ty), mask=both)


@triton.jit
def scaled(
    total: tl.tensor, rows: tl.tensor, columns: tl.tensor, there: tl.tensor, inside: tl.tensor,
    row_ptr: tl.tensor, column_ptr: tl.tensor, sums_ptr: tl.tensor, zero_ptr: tl.tensor,
    bias_ptr: tl.tensor, PER_ROW: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """fp32: sums of codes times their scales, and the bias; the zero point is taken out first."""
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
    return y


@triton.jit
def _sums(
    x, weight, row, column, m, n, k,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """(M, N), int32 of WHOLE codes, else fp32; beyond the ends it is of no use."""
    total = tl.zeros((M, N), tl.int32 if WHOLE else tl.float32)
    if TMA:
        for step in range(tl.cdiv(k, K)):
            a, b = x.load([row, step * K]), weight.load([column, step * K])
            total = tl.dot(a, b.T, total, out_dtype=total.dtype)
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
                a = tl.load(x_at, mask=left, other=0 if WHOLE else 0.0)
                b = tl.load(weight_at, mask=left, other=0 if WHOLE else 0.0)
            total = tl.dot(a, b.T, total, out_dtype=total.dtype)
            x_at += K
            weight_at += K
    return total


class After(NamedTuple):
    """What follows a product: residual (M, N), gate (images, N), of `each` rows an image."""

    residual: Tensor
    gate: Tensor | None
    each: int


def after(gate: Tensor | None, residual: Tensor) -> After:
    """Of tensors as a block has them: residual (..., N), gate (N,) or (B or 1, 1, ..., N)."""
    rows = residual.reshape(-1, residual.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    if gate is not None:
        gate = gate.reshape(-1, gate.shape[-1])
        gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    one = gate is None or len(gate) == 1
    return After(rows, gate, max(1, len(rows) if one else len(rows) // len(residual)))


def linear(
    x: Tensor,
    x_scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
    after: After | None = None,
) -> Tensor:
    """The operation in `dtype`, (M, N): x (M, K), weight (N, K), int8 codes less 128 or e4m3.

    x_scale: fp32, one element or (M, 1). zero: int32 (1,), None for 128 and for e4m3. w_scale fp32
    and sums int32 (N,): the latter of the weight's rows, None for e4m3. bias (N,), of any float
    type. tiles: these, and none are tried.
    """
    (m, k), n = x.shape, len(weight)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    bias = None if bias is None else bias.contiguous()
    x, weight, x_scale = (t.contiguous() for t in (x, weight, x_scale))
    given = x, weight, x_scale, w_scale, sums, zero, bias, out, after
    if tiles is None:
        some = candidates(m, k, x.device, all(t.data_ptr() % 16 == 0 for t in (x, weight)))
        kind = (bucket(m), n, k, str(dtype), len(some))
        kind += () if sums is not None else ("e4m3",)
        kind += () if after is None else (after.gate is not None,)
        tiles = chosen(_product, kind, some, x.device, lambda t: _launch(t, *given))
    return _launch(tiles, *given)


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
    tiles: Tiles, x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, sums: Any,
    zero: Any, bias: Any, out: Tensor, after: After | None,
) -> Tensor:  # fmt: skip
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
    gate, residual = (None, None) if after is None else (after.gate, after.residual)
    whole = after is not None and after.each % tiles.m == 0
    kind = "none" if gate is None else "row" if whole or len(gate) == 1 else "rows"
    strides = [0 if t is None else t.stride(0) if len(t) > 1 else 0 for t in (gate, residual)]
    start(
        _product, (programs,), x,
        *operands, target, x_scale, w_scale, sums, zero, bias, gate, residual,
        m, n, k, after.each if after else m, *strides,
        M=tiles.m, N=tiles.n, K=tiles.k, GROUP=tiles.group, PER_ROW=x_scale.numel() > 1,
        ZERO=zero is not None, BIAS=bias is not None, EVEN=k % tiles.k == 0, TMA=tiles.tma,
        STORE=store, PERSISTENT=tiles.persistent, WHOLE=sums is not None, GATE=kind,
        RESIDUAL=residual is not None, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a card has; a few elsewhere."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
