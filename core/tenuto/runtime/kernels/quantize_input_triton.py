"""`quantize_input.py` on CUDA in one pass: a program keeps its rows in registers.

Codes of whole numbers come out as int8, less 128: what the products of a GPU take.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import float8, integer_codes
from .quantize_input import TYPES
from .tiles_triton import Tiles, bucket, chosen, start

TILE, BLOCK = 2048, 4096  # elements of a program: of short rows, of a stored range
TOP = {"int": 127.0, "e4m3": float8.MOST}
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: added, it leaves whole numbers in the lowest bits


@triton.jit
def _rounded(x):
    """To nearest, ties to even; |x| below 2^22."""
    return (x + MAGIC) - MAGIC


@triton.jit
def larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The larger one; NaN where there is one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quotient(x, scale, inverse):
    """x / scale, rounded to nearest, by 1 / scale: a third of the time of a division.

    The remainder of a first quotient corrects it (Markstein, IBM J. Res. Dev. 34(1), 1990). Where
    1 / scale is 0 a scale of 0 takes the correction out: see `_corrected`.
    """
    first = x * inverse
    return tl.fma(tl.fma(-first, scale, x), inverse, first)


@triton.jit
def _corrected(scale, inverse):
    """Scales for `_quotient`."""
    return tl.where(inverse == 0, 0.0, scale)


@triton.jit
def _added(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return a + b


@triton.jit
def total(x: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """Sums of the rows, (ROWS, 1). Of one row a number: it fits any layout of what it meets.

    A tensor of one row would have a layout, and what gave it be computed anew in another.
    """
    return tl.reduce(x, None, _added) if ROWS == 1 else tl.reduce(x, 1, _added)[:, None]  # pyright: ignore


@triton.jit
def largest(x: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """The largest absolute values of the rows, as `total`."""
    size = tl.abs(x)
    return tl.reduce(size, None, larger) if ROWS == 1 else tl.reduce(size, 1, larger)[:, None]  # pyright: ignore


@triton.jit
def scale_of(
    size: tl.tensor, ROWS: tl.constexpr, TOP: tl.constexpr, TINY: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Scales of rows by their largest values, and 1 / scale; all are as `largest` gives them."""
    if ROWS == 1:
        scale = larger(tl.div_rn(size, TOP), TINY)  # pyright: ignore[reportArgumentType]
        inverse = tl.div_rn(1.0, scale)
    else:
        low = tl.full((ROWS, 1), TINY, tl.float32)
        scale = larger(tl.div_rn(size, tl.full((ROWS, 1), TOP, tl.float32)), low)
        inverse = tl.div_rn(tl.full((ROWS, 1), 1.0, tl.float32), scale)
    return scale, inverse


@triton.jit
def put(
    x: tl.tensor, scale: tl.tensor, inverse: tl.tensor, codes: tl.tensor, codes_ptr: tl.tensor,
    column: tl.tensor, inside: tl.tensor, WHOLE: tl.constexpr,
) -> None:  # fmt: skip
    """Write the codes of x (ROWS, WIDE), at `codes` of its rows and `column`.

    scale, 1 / scale by the largest value of a row: no quotient is beyond the last code.
    """
    value = _quotient(x, _corrected(scale, inverse), inverse)
    if WHOLE:  # a conversion to whole numbers takes several times as long as an addition
        value = (value + MAGIC).to(tl.int32, bitcast=True)  # pyright: ignore
    tl.store(codes + column[None, :], value.to(codes_ptr.dtype.element_ty), mask=inside)  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def put_rows(
    x: tl.tensor, more: tl.tensor, codes: tl.tensor, codes_ptr: tl.tensor, scale_ptr: tl.tensor,
    row: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    ROWS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, TOP: tl.constexpr,
    TINY: tl.constexpr, WHOLE: tl.constexpr,
) -> None:  # fmt: skip
    """Write codes and scales of rows whose first WIDE values are x, and the next REST `more`.

    Both are 0 beyond the end of a row. codes: where its codes begin, (ROWS, 1).
    """
    there, column = (row < rows)[:, None], tl.arange(0, WIDE)
    size = largest(x, ROWS)
    if REST:
        size = larger(size, largest(more, ROWS))
    scale, inverse = scale_of(size, ROWS, TOP, TINY)  # pyright: ignore[reportArgumentType]
    inside = there & (column < columns)[None, :]
    put(x, scale, inverse, codes, codes_ptr, column, inside, WHOLE)
    if REST:
        rest = WIDE + tl.arange(0, REST)
        beside = there & (rest < columns)[None, :]
        put(more, scale, inverse, codes, codes_ptr, rest, beside, WHOLE)
    tl.store(scale_ptr + row[:, None], scale, mask=there)


@triton.jit
def line(ptr: tl.tensor, far: tl.tensor, column: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Values in fp32, 0 where nothing is inside."""
    return tl.load(ptr + far + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rows(
    x_ptr, codes_ptr, scale_ptr, rows, columns, stride,
    ROWS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, TOP: tl.constexpr,
    TINY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, far, column = (row < rows)[:, None], row.to(tl.int64)[:, None], tl.arange(0, WIDE)
    x = line(x_ptr, far * stride, column, there & (column < columns)[None, :])
    more = x
    if REST:
        rest = WIDE + tl.arange(0, REST)
        more = line(x_ptr, far * stride, rest, there & (rest < columns)[None, :])
    put_rows(
        x, more, codes_ptr + far * columns, codes_ptr, scale_ptr, row, rows, columns,
        ROWS, WIDE, REST, TOP, TINY, WHOLE,
    )  # fmt: skip


@triton.jit
def _images(x_ptr, codes_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    image, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, where = at < size, image * size + at
    scale = tl.load(scale_ptr + image)
    inverse = tl.div_rn(1.0, scale)
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    quotient = _quotient(x, _corrected(scale, inverse), inverse)
    value = _rounded(tl.minimum(tl.maximum(quotient, -127.0), 127.0))
    tl.store(codes_ptr + where, value.to(tl.int8), mask=inside)


@triton.jit
def _stored(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, index_ptr, scale_ptr, zero_ptr, count,
    BLOCK: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    index = tl.load(index_ptr)
    scale = tl.load(scales_ptr + index)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, scale)
    value = _quotient(x, _corrected(scale, inverse), inverse)
    if WHOLE:
        zero = tl.load(zeros_ptr + index)
        value = _rounded(tl.minimum(tl.maximum(value, -512.0), 512.0)) + zero
        value = tl.minimum(tl.maximum(value, 0.0), 255.0) - 128.0
        if tl.program_id(0) == 0:
            tl.store(zero_ptr, zero.to(tl.int32))
    else:
        value = tl.minimum(tl.maximum(value, -MOST), MOST)
    tl.store(codes_ptr + at, value.to(codes_ptr.dtype.element_ty), mask=at < count)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)


def per_row(x: Tensor, dtype: str = "int", tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """Codes (..., K) and fp32 scales (..., 1) of a range a row; x: fp16, bf16 or fp32.

    dtype: "int" gives int8 codes, "e4m3" torch's 8-bit floats. K at most `quantize_input.WIDEST`.
    tiles: these, and none are tried.
    """
    flat = lines(x)
    rows, columns = flat.shape
    codes = torch.empty(x.shape, dtype=TYPES[dtype], device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)

    def run(t: Tiles) -> tuple[Tensor, Tensor]:
        start(
            _rows, (triton.cdiv(rows, t.m),), x,
            flat, codes, scale, rows, columns, flat.stride(0), **options(t, dtype),
        )  # fmt: skip
        return codes, scale

    kind = (bucket(rows), columns, str(x.dtype), dtype)
    some = [t for t in whole_rows(columns) if t.warps <= warps(t.n + t.k)]
    return run(tiles or chosen(_rows, kind, some, x.device, run))


def whole_rows(columns: int) -> list[Tiles]:
    """Programs that keep rows in registers, the safe ones first: m of them, n + k columns wide.

    A tile's sides are powers of two: of 1152 columns 2048 are made in one, 1024 + 128 in two.
    """
    found, wide = [], triton.next_power_of_2(columns)
    half = wide // 2
    rest = triton.next_power_of_2(columns - half) if 1 < columns < wide else half
    for n, k in ((wide, 0), (half, max(16, rest)))[: 1 + (max(16, rest) < half)]:
        high, usual = max(1, TILE // triton.next_power_of_2(n + k)), warps(n + k)
        alone = TILE // 4 < n + k <= TILE  # a warp with a row of its own waits for no other
        few = Tiles(1, n, k, 1) if alone else Tiles(high, n, k, usual // 2)
        found += [Tiles(high, n, k, usual), few]
        if high == 1:  # of several rows in 8 warps Triton 3.6 stores wrong codes on an H200
            found.append(Tiles(high, n, k, 2 * usual))
    return found


def options(tiles: Tiles, dtype: str) -> dict[str, Any]:
    """The launch options of kernels that write rows."""
    return {
        "ROWS": tiles.m, "WIDE": tiles.n, "REST": tiles.k, "TOP": TOP[dtype],
        "TINY": integer_codes.TINY, "WHOLE": dtype == "int", "num_warps": tiles.warps,
    }  # fmt: skip


def per_image(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (B, C, H, W) and fp32 scales (B, 1, 1, 1) of a range an image, laid out as `x`."""
    given = _dense(x)
    size = torch.linalg.vector_norm(
        given, float("inf"), dim=(1, 2, 3), keepdim=True, dtype=torch.float32
    )
    scale = size.div_(TOP["int"]).clamp_min_(integer_codes.TINY)
    codes, inner = torch.empty_like(given, dtype=torch.int8), x[0].numel()
    start(
        _images, (len(x), triton.cdiv(inner, BLOCK)), x, given, codes, scale, inner, BLOCK=BLOCK,
        num_warps=8,
    )  # fmt: skip
    return codes, scale


def stored(
    x: Tensor, scales: Tensor, zeros: Tensor, index: Tensor, dtype: str = "int"
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of one of the ranges (T,), its scale fp32 (1,) and its zero point int32 (1,).

    index: int64 (1,), which one; it stays on the device. zeros: fp32; of "e4m3" there are none.
    """
    given = _dense(x)
    codes = torch.empty_like(given, dtype=TYPES[dtype])
    scale = torch.empty(1, dtype=torch.float32, device=x.device)
    zero = torch.empty(1, dtype=torch.int32, device=x.device)
    start(
        _stored, (triton.cdiv(x.numel(), BLOCK),), x,
        given, codes, scales, zeros, index, scale, zero, x.numel(), BLOCK=BLOCK, MOST=float8.MOST,
        WHOLE=dtype == "int", num_warps=8,
    )  # fmt: skip
    return codes, scale, zero


def lines(x: Tensor) -> Tensor:
    """(R, K) with neighbouring columns side by side; a part of a wider tensor is not copied."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _dense(x: Tensor) -> Tensor:
    """`x` without holes in memory, channels last if it is so."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def warps(elements: int) -> int:
    """Of a program with so many elements of rows."""
    return 4 if elements <= 4096 else 8
