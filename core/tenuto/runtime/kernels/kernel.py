"""What a kernel is: an object of a file in this folder, which layers find by asking for a case.

A file that defines a `Kernel` at its top level is enough, see `registry.py`. It opens with its
reference and declares what it takes; what goes in is the same for all kernels of an operation:
    call(x, x_scale, x_zero, packed, bias, dtype) -> y
x: codes of the input, (..., K) or (B, I, H, W): uint8 for whole codes, or the same less 128 as int8
(on CUDA), torch's 8-bit type for e4m3.
x_scale: fp32, one element, or one for each row (..., 1) or image (B, 1, 1, 1). x_zero: an int, or
one int32 element. packed: what `pack` made. bias: fp32 (N,) or None. y: in `dtype`, laid out as x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...numerics import Format, QTensor

OPERATIONS = ("linear", "conv2d")


class Packed(Protocol):
    """A weight made ready for a kernel. A cache: never state, never copied."""

    def codes(self) -> Tensor:
        """The codes that were packed, as `QTensor.codes` gives them."""
        ...

    def tensors(self) -> list[Tensor]:
        """What is resident."""
        ...


@dataclass(frozen=True)
class Formats:
    """The formats that a kernel takes: of one dtype and so many bits.

    levels: whether also those whose codes stand for 8-bit whole numbers, and these are what it
    gets. groups: whether the columns of a weight may have ranges in groups; an 8-bit code of its
    row stands for each value then too. granularities: of activations.
    """

    dtype: str = "int"
    levels: bool = False
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    groups: bool = True
    granularities: tuple[str, ...] = ("channel", "tensor", "token")

    def take(self, form: Format | None) -> bool:
        """Whether `form` is among them."""
        return (
            form is not None
            and (form.dtype == self.dtype or (self.levels and form.dtype == "int8_levels"))
            and form.bits in self.bits
            and form.granularity in self.granularities
            and (self.groups or not form.group)
        )


INT8_INPUTS = Formats(bits=(8,), granularities=("tensor", "token"))


@dataclass(frozen=True)
class Case:
    """What a layer asks for. shape: of its weight, (N, K) or (O, I / groups, kh, kw).

    dtype: of its input and output. geometry: of a convolution: stride, padding, dilation, groups.
    """

    operation: str
    weight: Format
    activation: Format | None
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    geometry: Any = None


@dataclass(frozen=True)
class Kernel:
    """One way to compute an operation on codes.

    supports: whether it computes a case of its formats: device, shape, dtype, geometry. pack: from
    a weight and a geometry. reference: (x, x_scale, x_zero, weight, bias, geometry), the weight a
    `QTensor`, in float64. word: what a layer says of itself that computes with it. priority: where
    nothing is measured the highest of those that take a case is used, then the first by name.
    any_bias: whether it takes a bias of any float type, not fp32 alone.
    """

    name: str
    operation: str
    weights: Formats
    inputs: Formats
    supports: Callable[[Case], bool]
    pack: Callable[[QTensor, Any], Any]
    reference: Callable[..., Tensor]
    call: Callable[..., Tensor]
    word: str = "int8"
    priority: int = 0
    any_bias: bool = False

    def takes(self, case: Case) -> bool:
        """Whether it computes `case`."""
        return (
            case.operation == self.operation
            and self.weights.take(case.weight)
            and self.inputs.take(case.activation)
            and self.supports(case)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernel:
        return self


def graph_operation(schema: str, call: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """`call` on tensors as the operation tenuto::`schema`, which a compiled graph keeps whole.

    fake: the output's shape, dtype and strides. None before torch 2.4, which has no such thing.
    """
    if not hasattr(torch.library, "register_fake"):
        return None
    name = schema.partition("(")[0]
    if not hasattr(torch.ops.tenuto, name):
        library = torch.library.Library("tenuto", "FRAGMENT")
        library.define(schema)
        library.impl(name, call, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tenuto::{name}", fake, lib=library)
        _libraries.append(library)
    return getattr(torch.ops.tenuto, name)


_libraries: list[Any] = []  # an operation goes with its library


def apart(zero: Any) -> tuple[Tensor | None, int]:
    """A zero point as an operation takes it: a tensor or a number."""
    return (zero, 0) if isinstance(zero, Tensor) else (None, int(zero))
