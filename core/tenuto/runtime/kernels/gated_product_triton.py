"""`gated_product.py` on CUDA: in the product's kernel, or by a pass after it if faster.

A tile has two sums, of the columns of the values and of the same columns of the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .product_triton import FEW, has_copy_engine, processors, scaled
from .quantize_after_triton import activated
from .tiles_triton import Tiles, bucket, chosen, start

APART = Tiles(0, 0, 0)  # a product as it is alone, and a pass after it
WIDE = 1024  # columns of a program of the pass
NARROW = Tiles(16, 32, 256), Tiles(16, 64, 128), Tiles(32, 32, 256), Tiles(64, 32, 128)
HOPPER = (
    Tiles(128, 64, 128, 4, 3), Tiles(128, 128, 128, 8, 3), Tiles(128, 128, 128, 8, 3, tma=True),
    Tiles(128, 128, 128, 8, 4, tma=True), Tiles(128, 128, 128, 8, 3, tma=True, persistent=True),
    Tiles(64, 128, 128, 4, 4), Tiles(64, 64, 128, 4, 4),
)  # fmt: skip
OTHERS = (
    Tiles(128, 64, 64, 4), Tiles(128, 128, 64, 8, 3), Tiles(64, 64, 64), Tiles(64, 64, 128, 4, 3),
)  # fmt: skip


@triton.jit
def _gated_product(
    x, weight, out, row_ptr, column_ptr, sums_ptr, zero_ptr, bias_ptr, m, n, k, value_at, gate_at,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr,
    ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    PERSISTENT: tl.constexpr, WHOLE: tl.constexpr, ACT: tl.constexpr, QUICK: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(m, M), tl.cdiv(n, N)
    every = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), down * across, every, flatten=PERSISTENT):  # pyright: ignore
        first = tile // (GROUP * across) * GROUP
        high = min(down - first, GROUP)
        row = (first + tile % (GROUP * across) % high) * M
        column = tile % (GROUP * across) // high * N
        value, gate = _two_sums(
            x, weight, row, column, m, n, k, value_at, gate_at, M, N, K, EVEN, TMA, WHOLE
        )
        rows, columns = row + tl.arange(0, M), column + tl.arange(0, N)
        there, inside = rows < m, columns < n
        y = scaled(
            value, rows, columns + value_at, there, inside, row_ptr, column_ptr, sums_ptr,
            zero_ptr, bias_ptr, PER_ROW, ZERO, BIAS,
        )  # fmt: skip
        z = scaled(
            gate, rows, columns + gate_at, there, inside, row_ptr, column_ptr, sums_ptr, zero_ptr,
            bias_ptr, PER_ROW, ZERO, BIAS,
        )  # fmt: skip
        y *= activated(z, ACT, QUICK)
        at = rows.to(tl.int64)[:, None] * n + columns[None, :]
        both = there[:, None] & inside[None, :]
        tl.store(out + at, y.to(out.dtype.element_ty), mask=both)


@triton.jit
def _two_sums(
    x, weight, row, column, m, n, k, value_at, gate_at,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Two of (M, N), int32 of WHOLE codes, else fp32; beyond the ends they are of no use."""
    value = tl.zeros((M, N), tl.int32 if WHOLE else tl.float32)
    gate = tl.zeros((M, N), tl.int32 if WHOLE else tl.float32)
    if TMA:
        for step in range(tl.cdiv(k, K)):
            a = x.load([row, step * K])
            b = weight.load([column + value_at, step * K])
            c = weight.load([column + gate_at, step * K])
            value = tl.dot(a, b.T, value, out_dtype=value.dtype)
            gate = tl.dot(a, c.T, gate, out_dtype=gate.dtype)
    else:
        depth = tl.arange(0, K)
        rows = ((row + tl.arange(0, M)) % m).to(tl.int64)
        columns = ((column + tl.arange(0, N)) % n).to(tl.int64)
        x_at = x + rows[:, None] * k + depth[None, :]
        value_of = weight + (columns + value_at)[:, None] * k + depth[None, :]
        gate_of = weight + (columns + gate_at)[:, None] * k + depth[None, :]
        for step in range(tl.cdiv(k, K)):
            if EVEN:
                a, b, c = tl.load(x_at), tl.load(value_of), tl.load(gate_of)
            else:
                left = (depth < k - step * K)[None, :]
                a = tl.load(x_at, mask=left, other=0 if WHOLE else 0.0)
                b = tl.load(value_of, mask=left, other=0 if WHOLE else 0.0)
                c = tl.load(gate_of, mask=left, other=0 if WHOLE else 0.0)
            value = tl.dot(a, b.T, value, out_dtype=value.dtype)
            gate = tl.dot(a, c.T, gate, out_dtype=gate.dtype)
            x_at += K
            value_of += K
            gate_of += K
    return value, gate


@triton.jit
def _gate(y_ptr, out_ptr, n, value_at, gate_at, WIDE: tl.constexpr, ACT: tl.constexpr,
          QUICK: tl.constexpr):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = column < n
    at = y_ptr + row * 2 * n + column
    y = tl.load(at + value_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(at + gate_at, mask=inside, other=0.0).to(tl.float32)
    y *= activated(gate, ACT, QUICK)
    tl.store(out_ptr + row * n + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def gated(y: Tensor, act: str, first: bool) -> Tensor:
    """value * act(gate) in the dtype of y = [value, gate], a contiguous (M, 2 N)."""
    n = y.shape[1] // 2
    out = torch.empty((len(y), n), dtype=y.dtype, device=y.device)
    start(
        _gate, (len(y), triton.cdiv(n, WIDE)), y,
        y, out, n, *_places(n, first), WIDE=WIDE, ACT=act, QUICK=_quick(y), num_warps=4,
    )  # fmt: skip
    return out


def linear(
    x: Tensor, x_scale: Tensor, zero: Tensor | None, weight: Tensor, w_scale: Tensor,
    sums: Tensor | None, bias: Tensor | None, act: str, first: bool, dtype: torch.dtype,
    tiles: Tiles,
) -> Tensor:  # fmt: skip
    """The operation in `dtype`, (M, N), in one kernel; as `product_triton.linear` is given it.

    weight: (2 N, K).
    """
    (m, k), n = x.shape, len(weight) // 2
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    bias = None if bias is None else bias.contiguous()
    x, weight, x_scale = (t.contiguous() for t in (x, weight, x_scale))
    programs = triton.cdiv(m, tiles.m) * triton.cdiv(n, tiles.n)
    if tiles.persistent:
        programs = min(programs, processors(x.device))
    operands: tuple[Any, ...] = x, weight
    if tiles.tma:
        sides = zip((x, weight), (tiles.m, tiles.n), strict=True)
        operands = tuple(TensorDescriptor.from_tensor(t, [side, tiles.k]) for t, side in sides)
    start(
        _gated_product, (programs,), x,
        *operands, out, x_scale, w_scale, sums, zero, bias, m, n, k, *_places(n, first),
        M=tiles.m, N=tiles.n, K=tiles.k, GROUP=tiles.group, PER_ROW=x_scale.numel() > 1,
        ZERO=zero is not None, BIAS=bias is not None, EVEN=k % tiles.k == 0, TMA=tiles.tma,
        PERSISTENT=tiles.persistent, WHOLE=sums is not None, ACT=act, QUICK=_quick(x),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def candidates(x: Tensor, weight: Tensor) -> tuple[Tiles, ...]:
    """What is worth trying, the safe one first."""
    if len(x) <= FEW:
        return APART, *NARROW
    if not has_copy_engine(x.device):
        return APART, *OTHERS
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, weight)) and x.shape[1] % 16 == 0
    return APART, *(tiles for tiles in HOPPER if aligned or not tiles.tma)


def fastest(
    product: Callable[[], Tensor], x: Tensor, x_scale: Tensor, zero: Tensor | None, weight: Tensor,
    w_scale: Tensor, sums: Tensor | None, bias: Tensor | None, act: str, first: bool,
    dtype: torch.dtype, rows: str,
) -> Any:  # fmt: skip
    """The operation in `dtype`: by `product()`, (M, 2 N), and a pass, or in one kernel.

    rows: of which codes and scales are wanted, "int" or "e4m3"; "": of none.
    """

    def run(t: Tiles) -> Any:
        if t != APART:
            y = linear(x, x_scale, zero, weight, w_scale, sums, bias, act, first, dtype, t)
            return torch.ops.tenuto.quantize_rows(y, rows) if rows else y
        y = product()
        if not rows:
            return gated(y, act, first)
        value, gate = y.chunk(2, -1)[::-1] if first else y.chunk(2, -1)
        return torch.ops.tenuto.quantize_acted(None, gate, value, act, rows)

    (m, k), n = x.shape, len(weight)
    some = candidates(x, weight)
    kind = (str(x.dtype), bucket(m), n, k, act, first, str(dtype), rows, len(some))
    return run(chosen(_gated_product, kind, some, x.device, run))


def _places(n: int, first: bool) -> tuple[int, int]:
    """The first columns of the values and of the gate."""
    return (n, 0) if first else (0, n)


def _quick(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None
