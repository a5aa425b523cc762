"""The convolution of x_scale * (x - x_zero) with w_scale * codes, plus bias, with 8-bit codes.

Constraints: x uint8 (B, I, H, W); codes int8 (O, I / groups, kh, kw); zero padding; x_scale fp32,
one element or (B, 1, 1, 1). CPU: oneDNN, never depthwise (slower than float). CUDA: `torch._int_mm`
on the patches of the codes, one group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...numerics import QTensor
from . import int8_cpu
from .epilogue import finished, in_pieces
from .int8_linear import IntLinear
from .kernel import INT8_INPUTS, Case, Formats, Kernel, apart, graph_operation
from .quantize_input import MIDDLE, compiling, counted, signed

EIGHT = 8  # what cuBLAS wants a multiple of


def reference(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Any,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
) -> Tensor:
    """The operation in float64."""
    w = codes.double() * w_scale.double().view(-1, 1, 1, 1)
    zero = x_zero.double() if isinstance(x_zero, Tensor) else float(x_zero)
    x = counted(x, torch.float64) - zero
    y = torch.nn.functional.conv2d(x, w, None, *geometry) * x_scale.double()
    return y if bias is None else y + bias.double().view(-1, 1, 1)


def supported(device: torch.device, shape: tuple[int, ...], groups: int = 1) -> bool:
    """Whether a kernel executes a weight of `shape` (O, I / groups, kh, kw) on `device`."""
    if device.type == "cpu":
        return shape[1] > 1 and int8_cpu.available()
    return device.type == "cuda" and groups == 1 and torch.version.hip is None


def pack(
    codes: Tensor, w_scale: Tensor, geometry: tuple[Any, ...]
) -> int8_cpu.PackedConv2d | IntConv2d:
    """`codes` made ready for their device; geometry: stride, padding, dilation, groups."""
    plain = tuple(list(g) if isinstance(g, tuple) else g for g in geometry)
    if codes.device.type == "cpu":
        return int8_cpu.PackedConv2d(codes, w_scale, plain)
    return IntConv2d(codes, w_scale, plain)


def int8_conv2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Any,
    packed: Any,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The operation on a packed weight, in `dtype`, laid out as `x`: fp32 sums, rounded once.

    Norms of contiguous models are many times slower on channels_last, which the operators return.
    """
    form = layout(x)
    if int8_cpu.takes(packed, x_scale, x_zero, dtype):
        return packed(x, x_zero, x_scale.view(1), bias, dtype).contiguous(memory_format=form)
    wide = None if bias is None else bias.view(-1, 1, 1)
    width = len(packed.scale) * x.shape[-2] * x.shape[-1]
    scale = x_scale.view(-1, 1, 1, 1)
    return in_pieces(
        lambda q, s: finished(packed(q, x_zero), s, wide, dtype), x, scale, width, dtype, form
    )


def layout(x: Tensor) -> Any:
    """How `x` lies in memory."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def out_size(size: Any, taps: Any, geometry: Any) -> list[int]:
    """(H', W') of the output; geometry: stride, padding, dilation."""
    every = zip(size, taps, *geometry, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in every]


class IntConv2d:
    """An int8 weight for `torch._int_mm` on patches: zero-padded to what cuBLAS takes."""

    split = False

    def __init__(self, codes: Tensor, scale: Tensor, geometry: tuple[Any, ...]) -> None:
        self._facts(tuple(codes.shape), geometry)
        rows = codes.permute(0, 2, 3, 1).flatten(1)  # (O, kh * kw * I), channels innermost
        more = -len(rows) % EIGHT
        rows = torch.nn.functional.pad(rows, (0, self.short, 0, more))
        self.scale = scale.float()
        self.product = IntLinear(rows, torch.nn.functional.pad(self.scale, (0, more)))

    def _facts(self, shape: tuple[int, ...], geometry: tuple[Any, ...]) -> None:
        self.shape, self.geometry = shape, geometry
        self.stride, self.padding, self.dilation, _ = geometry
        self.short = -(shape[1] * shape[2] * shape[3]) % EIGHT

    @staticmethod
    def restored(tensors: list[Tensor], shape: Any, geometry: tuple[Any, ...]) -> IntConv2d:
        """What `tensors` are of."""
        found = IntConv2d.__new__(IntConv2d)
        found._facts(tuple(shape), geometry)
        found.product, found.scale = IntLinear.restored(tensors[:3]), tensors[3]
        return found

    def __call__(self, x: Tensor, zero: Any) -> Tensor:
        """The convolution of (x - zero) with scale * codes in fp32: uint8 (B, I, H, W)."""
        patches, size = self.patches(signed(x), zero)
        y = self.product.product(patches, zero)[:, : self.shape[0]]
        return y.unflatten(0, size).permute(0, 3, 1, 2)  # channels last

    def patches(self, x: Tensor, zero: Any) -> tuple[Tensor, tuple[int, ...]]:
        """(rows of K codes for each place of the output, (B, H', W')) of x - 128, int8."""
        (dh, dw), (sh, sw) = self.dilation, self.stride
        x = _padded(x.permute(0, 2, 3, 1), self.padding, zero)  # (B, H, W, I)
        kh, kw = self.shape[2:]
        batch, height, width, inner = x.shape
        high, wide = height - dh * (kh - 1) - 1, width - dw * (kw - 1) - 1
        size = (batch, high // sh + 1, wide // sw + 1)
        b, h, w, i = x.stride()
        steps = (b, sh * h, sw * w, dh * h, dw * w, i)
        rows = x.as_strided((*size, kh, kw, inner), steps).reshape(-1, kh * kw * inner)
        return (torch.nn.functional.pad(rows, (0, self.short)) if self.short else rows), size

    def codes(self) -> Tensor:
        """The weight that was packed, int8 (O, I, kh, kw)."""
        out, inner, kh, kw = self.shape
        rows = self.product.codes()[:out, : inner * kh * kw]
        return rows.reshape(out, kh, kw, inner).permute(0, 3, 1, 2).contiguous()

    def tensors(self) -> list[Tensor]:
        """What is resident."""
        return [*self.product.tensors(), self.scale]


def _padded(x: Tensor, padding: Any, zero: Any) -> Tensor:
    """int8 (B, H, W, I) with a border of the code that stands for 0; `zero` never leaves a GPU."""
    ph, pw = padding
    if not ph and not pw:
        return x
    shape = (x.shape[0], x.shape[1] + 2 * ph, x.shape[2] + 2 * pw, x.shape[3])
    found = x.new_empty(shape)
    found[...] = zero - MIDDLE
    found[:, ph : ph + x.shape[1], pw : pw + x.shape[2]] = x
    return found


# --- the kernel -----------------------------------------------------------------------------------

SCHEMA = (
    "int8_conv2d(Tensor x, Tensor x_scale, Tensor? zero, int number, Tensor[] weight, bool split,"
    " int[] shape, int[] stride, int[] padding, int[] dilation, int groups, Tensor? bias,"
    " ScalarType dtype) -> Tensor"
)


def _on_tensors(
    x: Tensor,
    x_scale: Tensor,
    zero: Tensor | None,
    number: int,
    weight: list[Tensor],
    split: bool,
    shape: Any,
    *rest: Any,
) -> Tensor:
    *geometry, bias, dtype = rest
    sizes, packed = tuple(geometry), None
    if weight[0].is_mkldnn:
        facts = {"shape": tuple(shape), "geometry": sizes}
        packed = int8_cpu.PackedConv2d.restored(weight, split, **facts)
    else:
        packed = IntConv2d.restored(weight, shape, sizes)
    return int8_conv2d(x, x_scale, number if zero is None else zero, packed, bias, dtype)


def _fake(x: Tensor, x_scale: Tensor, zero: Any, number: int, *rest: Any) -> Tensor:
    size = out_size(x.shape[2:], rest[2][2:], rest[3:6])
    return x.new_empty((x.shape[0], rest[2][0], *size), dtype=rest[-1]).contiguous(
        memory_format=layout(x)
    )


_operation = graph_operation(SCHEMA, _on_tensors, _fake)


def _call(
    x: Tensor, x_scale: Tensor, x_zero: Any, packed: Any, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`int8_conv2d`; one node of a graph that is being made."""
    if _operation is None or not compiling():
        return int8_conv2d(x, x_scale, x_zero, packed, bias, dtype)
    facts = packed.tensors(), packed.split, packed.shape, *packed.geometry
    return _operation(x, x_scale, *apart(x_zero), *facts, bias, dtype)


def _reference(
    x: Tensor, x_scale: Tensor, x_zero: Any, weight: QTensor, bias: Tensor | None, geometry: Any
) -> Tensor:
    return reference(x, x_scale, x_zero, weight.codes(), weight.scale, bias, geometry)


def _pack(weight: QTensor, geometry: Any) -> Any:
    return pack(weight.codes(), weight.scale, geometry)


def _supports(case: Case) -> bool:
    return supported(case.device, case.shape, case.geometry[-1])


KERNEL = Kernel(
    "int8_conv2d", "conv2d", Formats(), INT8_INPUTS, _supports, _pack, _reference, _call
)  # fmt: skip
