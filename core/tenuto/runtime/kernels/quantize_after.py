"""Quantize the rows of what an activation or a norm gives, in one pass over their inputs.

Compilers compute what is before a row's range twice, or write it to memory in between, since the
range is of the whole row. Two operations of compiled graphs, see `fused_rows.py`, do it at once:
    quantize_acted   codes of [before, act(x) * gate], side by side
    quantize_normed  codes of norm(x) * weight + bias, and of that * times + plus; with `one`, of
                     that * (1 + times) + plus
Both give what `quantize_input.per_row` gives of the same: codes, whole ones as int8 less 128, and
fp32 scales (..., 1). Sums and products are fp32 and not rounded in between, as compilers make them.
On CUDA a kernel of Triton does it, elsewhere plain operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernel import graph_operation
from .quantize_input import FLOATS, PER_ROW, TYPES, WIDEST, has_float8, signed, triton_runs

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def reference_acted(before: Tensor | None, x: Tensor, gate: Tensor | None, act: str) -> Tensor:
    """What `quantize_acted` quantizes, fp32: x and gate (..., K), before (..., J), of its rows."""
    y = ACTS[act](x.float())
    y = y if gate is None else y * gate.float()
    return y if before is None else torch.cat([before.float(), y], -1)


def reference_normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, times: Tensor | None,
    plus: Tensor | None, eps: float, centered: bool, one: bool = False,
) -> Tensor:  # fmt: skip
    """What `quantize_normed` quantizes, fp32: x (B, ..., K); weight, bias (K,).

    times, plus: (K,), or (B or 1, 1, ..., K), one row for all of an image. centered: a layer norm;
    else the root of the mean square is divided by. one: `times` is what 1 lacks.
    """
    times = times.float() + 1 if one and times is not None else times
    y = x.float()
    y = y - y.mean(-1, keepdim=True) if centered else y
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    for factor, term in ((weight, bias), (times, plus)):
        y = y if factor is None else y * factor.float()
        y = y if term is None else y + term.float()
    return y


def _acted(
    before: Tensor | None, x: Tensor, gate: Tensor | None, act: str, dtype: str
) -> tuple[Tensor, Tensor]:
    if _by_triton(x, dtype, x.shape[-1] + (0 if before is None else before.shape[-1])):
        from .quantize_after_triton import acted

        return acted(before, x, gate, act, dtype)
    return _rows(reference_acted(before, x, gate, act), dtype)


def _normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, times: Tensor | None,
    plus: Tensor | None, eps: float, centered: bool, dtype: str, one: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _by_triton(x, dtype, x.shape[-1]):
        from .quantize_after_triton import normed

        return normed(x, weight, bias, times, plus, eps, centered, dtype, one)
    return _rows(reference_normed(x, weight, bias, times, plus, eps, centered, one), dtype)


def _by_triton(x: Tensor, dtype: str, columns: int) -> bool:
    if x.device.type != "cuda" or not 0 < columns <= WIDEST or x.numel() == 0:
        return False
    able = dtype == "int" or has_float8(x.device.index)
    return able and x.dtype in FLOATS and triton_runs(x.device.index)


def _rows(y: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    codes, scale = PER_ROW[dtype](y)
    return signed(codes) if dtype == "int" else codes, scale


def _fake_acted(
    before: Tensor | None, x: Tensor, gate: Tensor | None, act: str, dtype: str
) -> tuple[Tensor, Tensor]:
    return _like(x, x.shape[-1] + (0 if before is None else before.shape[-1]), dtype)


def _fake_normed(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _like(x, x.shape[-1], next(word for word in rest if isinstance(word, str)))


def _like(x: Tensor, columns: int, dtype: str) -> tuple[Tensor, Tensor]:
    codes = x.new_empty((*x.shape[:-1], columns), dtype=TYPES[dtype])
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


quantize_acted = graph_operation(
    "quantize_acted(Tensor? before, Tensor x, Tensor? gate, str act, str dtype)"
    " -> (Tensor, Tensor)",
    _acted,
    _fake_acted,
)
quantize_normed = graph_operation(
    "quantize_normed(Tensor x, Tensor? weight, Tensor? bias, Tensor? times, Tensor? plus,"
    " float eps, bool centered, str dtype, bool one=False) -> (Tensor, Tensor)",
    _normed,
    _fake_normed,
)
