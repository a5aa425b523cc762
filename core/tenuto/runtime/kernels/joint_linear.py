"""Products of one input with several weights as one: the weights lie side by side in memory.

    joint_int8   what `int8_fused` computes, for several weights: (M, N1 + N2 + ...)
    joint_fp8    what `_scaled_mm` computes by row
Query, key and value are three products of one input. As one they fill a card better, and start two
kernels less. `lay` puts the packed weights of layers into one piece of memory, where each stays a
view; what does not lie so any more is computed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .fp8_linear import Float8Linear
from .int8_linear import IntLinear
from .kernel import graph_operation


def lay(packed: Sequence[Float8Linear | IntLinear]) -> bool:
    """Move packed weights into one piece of memory, in this order; whether one moved.

    They are of one class, and of one number of columns K.
    """
    if beside([p.weight.t() for p in packed]) is not None:
        return False
    sizes = [p.weight.shape[1] for p in packed]
    weights = torch.cat([p.weight.t() for p in packed]).split(sizes)  # (N, K) as they lie
    others: dict[str, Sequence[Tensor]] = {}
    for name in ("scale", "sums"):
        parts = [getattr(p, name) for p in packed if hasattr(p, name)]
        if parts:
            others[name] = torch.cat(parts, -1).split(sizes, -1)
    for n, (one, weight) in enumerate(zip(packed, weights, strict=True)):
        one.weight = weight.t()
        for name, values in others.items():
            setattr(one, name, values[n])
    return True


def beside(tensors: Sequence[Tensor]) -> Tensor | None:
    """Contiguous tensors (N, ...) that lie one after another in memory as one; else None."""
    first, end = tensors[0], tensors[0].data_ptr()
    for t in tensors:
        if t.data_ptr() != end or not t.is_contiguous() or t.dtype is not first.dtype:
            return None
        if t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += t.numel() * t.element_size()
    rows = sum(len(t) for t in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _joint_int8(
    x: Tensor, x_scale: Tensor, zero: Tensor | None, weights: list[Tensor], scales: list[Tensor],
    sums: list[Tensor], bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from .int8_fused import on_tensors

    weight = beside([w.t() for w in weights])
    if weight is not None:
        scale, total = (_whole(t) for t in (scales, sums))
        return on_tensors(x, x_scale, zero, weight.t(), scale, total, bias, dtype)
    parts = zip(weights, scales, sums, _parts(bias, weights), strict=True)
    return torch.cat([on_tensors(x, x_scale, zero, *some, dtype) for some in parts], -1)


def _joint_fp8(
    x: Tensor, x_scale: Tensor, weights: list[Tensor], scales: list[Tensor],
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    def product(weight: Tensor, scale: Tensor, added: Tensor | None) -> Tensor:
        return torch._scaled_mm(
            x, weight, scale_a=x_scale, scale_b=scale, bias=added, out_dtype=dtype,
            use_fast_accum=True,
        )  # fmt: skip

    weight = beside([w.t() for w in weights])
    if weight is not None:
        return product(weight.t(), _whole([s.view(-1) for s in scales])[None], bias)
    parts = zip(weights, scales, _parts(bias, weights), strict=True)
    return torch.cat([product(*some) for some in parts], -1)


def _whole(tensors: list[Tensor]) -> Tensor:
    found = beside(tensors)
    return torch.cat(tensors) if found is None else found


def _parts(bias: Tensor | None, weights: list[Tensor]) -> Sequence[Tensor | None]:
    sizes = [w.shape[1] for w in weights]
    return [None] * len(sizes) if bias is None else [b.contiguous() for b in bias.split(sizes)]


def _fake(x: Tensor, *rest: Any) -> Tensor:
    weights = next(value for value in rest if isinstance(value, (list, tuple)))
    return x.new_empty((x.shape[0], sum(w.shape[1] for w in weights)), dtype=rest[-1])


joint_int8 = graph_operation(
    "joint_int8(Tensor x, Tensor x_scale, Tensor? zero, Tensor[] weights, Tensor[] scales,"
    " Tensor[] sums, Tensor? bias, ScalarType dtype) -> Tensor",
    _joint_int8,
    _fake,
)
joint_fp8 = graph_operation(
    "joint_fp8(Tensor x, Tensor x_scale, Tensor[] weights, Tensor[] scales, Tensor? bias,"
    " ScalarType dtype) -> Tensor",
    _joint_fp8,
    _fake,
)
