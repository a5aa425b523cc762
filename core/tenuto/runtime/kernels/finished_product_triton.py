"""`finished_product.py` on CUDA: in the product's kernel, or by a pass after it if faster."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .product_triton import After, after, candidates, linear
from .tiles_triton import Tiles, bucket, chosen, start

APART = Tiles(0, 0, 0)  # a product as it is alone, and a pass after it
LEAN = Tiles(128, 256, 128, 8, 2, tma=True, persistent=True)  # leaves memory for a residual
WIDE = 1024  # columns of a program


@triton.jit
def _gated(
    y_ptr, gate_ptr, residual_ptr, out_ptr, columns, each, gate_stride, residual_stride,
    WIDE: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = column < columns
    y = tl.load(y_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        at = gate_ptr + row // each * gate_stride + column
        y *= tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = residual_ptr + row * residual_stride + column
    y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def gated(y: Tensor, then: After) -> Tensor:
    """residual + gate * y in the dtype of y, a contiguous (M, N)."""
    out, columns = torch.empty_like(y), y.shape[-1]
    stride = 0 if then.gate is None or len(then.gate) == 1 else then.gate.stride(0)
    start(
        _gated, (len(y), triton.cdiv(columns, WIDE)), y,
        y, then.gate, then.residual, out, columns, then.each, stride, then.residual.stride(0),
        WIDE=WIDE, GATE=then.gate is not None, num_warps=4,
    )  # fmt: skip
    return out


def fastest(
    product: Callable[[], Tensor], x: Tensor, x_scale: Tensor, zero: Tensor | None, weight: Tensor,
    w_scale: Tensor, sums: Tensor | None, bias: Tensor | None, gate: Tensor | None,
    residual: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The operation in `dtype`: by `product()`, (M, N), and a pass, or in one kernel.

    Else as `product_triton.linear` takes it, and `after` gate and residual.
    """
    then = after(gate, residual)

    def run(t: Tiles) -> Tensor:
        if t == APART:
            return gated(product(), then)
        return linear(x, x_scale, zero, weight, w_scale, sums, bias, dtype, t, then)

    (m, k), n = x.shape, len(weight)
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, weight))
    some = candidates(m, k, x.device, aligned)
    some = (APART, *some, *((LEAN,) if any(t.persistent for t in some) else ()))
    kind = (str(x.dtype), bucket(m), n, k, gate is None, str(dtype), len(some))
    return run(chosen(_gated, kind, some, x.device, run)).view(residual.shape)
