"""y = x_scale * x @ (w_scale * codes).T + bias with 8-bit floats (e4m3), by `torch._scaled_mm`.

Constraints: x e4m3 (..., K), row by row; codes e4m3 (N, K), read as (K, N) column by column,
without a copy; N and K multiples of 16; x_scale fp32, one element or (..., 1). CUDA of compute
capability 8.9 or higher (Ada, Hopper, Blackwell). All of it is plain operations: a graph has no
break, and Inductor fuses what makes the codes into the operation before it.

In bf16 the scales of rows and the bias are in the product's own epilogue. What that epilogue has
not (another dtype, another card) is done after a product in fp32. Sums are fast ones where the
output is rounded to 16 bits.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...numerics import QTensor, float8
from ...text import first_line
from .epilogue import finished
from .kernel import Case, Formats, Kernel

STEP = 16  # N and K are multiples of it
OLDEST = (8, 9)  # compute capability
BY_ROW, WHOLE = "by row", "whole"  # what takes scales: the product, or what follows it

log = logging.getLogger("tenuto")


def reference(
    x: Tensor, x_scale: Tensor, codes: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The operation in float64."""
    y = x.double() @ (w_scale.double()[:, None] * codes.double()).T * x_scale.double()
    return y if bias is None else y + bias.double()


class Float8Linear:
    """A weight in e4m3 for `torch._scaled_mm`. way: what takes the scales of a product in bf16."""

    def __init__(self, codes: Tensor, scale: Tensor, way: str) -> None:
        self.weight = codes.contiguous().t()  # (K, N), column-major as cuBLAS wants it
        self.scale = scale.float()[None]  # (1, N)
        self.one = torch.ones((), device=codes.device)
        self.way = way

    def codes(self) -> Tensor:
        """The weight that was packed, e4m3 (N, K)."""
        return self.weight.t()

    def tensors(self) -> list[Tensor]:
        """What is resident."""
        return [self.weight, self.scale, self.one]


def fp8_linear(
    x: Tensor, x_scale: Tensor, packed: Float8Linear, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The operation on a packed weight, in `dtype`. bias: fp32 (N,); rounded to bf16 in bf16."""
    rows, scale, weight = x.reshape(-1, x.shape[-1]), x_scale.reshape(-1, 1), packed.weight
    if dtype is torch.bfloat16 and packed.way == BY_ROW:
        scale = scale.expand(rows.shape[0], 1).contiguous()
        added = None if bias is None else bias.to(dtype)
        y = torch._scaled_mm(
            rows, weight, scale_a=scale, scale_b=packed.scale, bias=added, out_dtype=dtype,
            use_fast_accum=True,
        )  # fmt: skip
    else:
        y = torch._scaled_mm(
            rows, weight, scale_a=packed.one, scale_b=packed.one, out_dtype=torch.float32,
            use_fast_accum=dtype is not torch.float32,
        )  # fmt: skip
        y = finished(y * packed.scale, scale, bias, dtype)
    return y.unflatten(0, x.shape[:-1]) if x.ndim != 2 else y


def way_of(device: torch.device) -> str | None:
    """What takes the scales where a product in bf16 is computed; None where there is no product."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _tried(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _tried(index: int) -> str | None:
    if torch.cuda.get_device_capability(index) < OLDEST:
        return None
    said = ""
    for way in (BY_ROW, WHOLE):
        try:
            _try(torch.device("cuda", index), way)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            said = first_line(error)
        else:
            return way
    log.warning(
        "fp8 layers are simulated or compute in float: torch %s has no product of 8-bit floats "
        "for this card (%s).", torch.__version__, said,
    )  # fmt: skip
    return None


def _try(device: torch.device, way: str) -> None:
    """A product of `way`; an error of this torch or of this card is raised."""
    codes = torch.ones(STEP, STEP, device=device).to(float8.CODES)
    packed = Float8Linear(codes, torch.ones(STEP, device=device), way)
    for dtype in (torch.bfloat16,) if way == BY_ROW else (torch.float16, torch.float32):
        y = fp8_linear(codes, torch.ones(STEP, 1, device=device), packed, None, dtype)
        if not bool((y == STEP).all()):
            raise ValueError("a product is wrong")


# --- the kernel -----------------------------------------------------------------------------------


def _call(
    x: Tensor, x_scale: Tensor, x_zero: Any, packed: Any, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return fp8_linear(x, x_scale, packed, bias, dtype)


def _reference(
    x: Tensor, x_scale: Tensor, x_zero: Any, weight: QTensor, bias: Tensor | None, geometry: Any
) -> Tensor:
    return reference(x, x_scale, weight.codes(), weight.scale, bias)


def _pack(weight: QTensor, geometry: Any) -> Float8Linear:
    return Float8Linear(weight.codes(), weight.scale, way_of(weight.scale.device) or WHOLE)


def _supports(case: Case) -> bool:
    multiple = case.shape[0] % STEP == 0 and case.shape[1] % STEP == 0
    return multiple and way_of(case.device) is not None


_E4M3 = Formats("e4m3", bits=(8,), groups=False)
KERNEL = Kernel(
    "fp8_linear", "linear", _E4M3, replace(_E4M3, granularities=("tensor", "token")), _supports,
    _pack, _reference, _call, word="fp8", any_bias=True,
)  # fmt: skip
