"""`QTensor`: a quantized weight, and how its codes are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import numerics
from .scheme import Format


@dataclass(frozen=True)
class QTensor:
    """Codes of a weight, one range per output channel.

    qdata: int8 (N, ...) for 5 to 8 bits, else two codes a byte, uint8 (N, ceil(K / 2)).
    scale: fp32 (N,). zero_point: uint8 (N,), or None where the range is symmetric.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, ...]
    bits: int

    @staticmethod
    def from_codes(
        codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool
    ) -> QTensor:
        """A weight from float codes (N, ...) as `numerics.quantize` makes them."""
        shape, zero = tuple(codes.shape), None
        if not symmetric:
            zero = zero_point.to(torch.uint8)
            codes = codes - zero_point.view(-1, *[1] * (codes.ndim - 1))
        elif bits <= 4:  # stored unsigned
            zero = torch.full_like(zero_point, 2 ** (bits - 1), dtype=torch.uint8)
        return QTensor(stored(codes, zero, bits), scale.float(), zero, shape, bits)

    def codes(self) -> Tensor:
        """Signed codes with the zero point taken out: int8 (or int16) of the weight's shape."""
        if self.zero_point is None:
            return self.qdata
        size = int(torch.Size(self.shape[1:]).numel())
        rows = numerics.unpack_int4(self.qdata, size) if self.bits <= 4 else self.qdata
        wide = rows.to(torch.int16) - self.zero_point.to(torch.int16)[:, None]
        return (wide.to(torch.int8) if self.bits < 8 else wide).view(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for."""
        scale = self.scale.view(-1, *[1] * (len(self.shape) - 1))
        return (self.codes().to(scale.dtype) * scale).to(dtype)

    def to(self, device: Any) -> QTensor:
        """The same weight on another device."""
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return QTensor(self.qdata.to(device), self.scale.to(device), zero, self.shape, self.bits)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Named tensors for a file."""
        found = {f"{name}.qdata": self.qdata, f"{name}.scale": self.scale}
        return found if self.zero_point is None else found | {f"{name}.zero_point": self.zero_point}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], name: str, shape: Any, bits: int) -> QTensor:
        """The weight that `tensors` stored under `name`."""
        zero = tensors.get(f"{name}.zero_point")
        return QTensor(tensors[f"{name}.qdata"], tensors[f"{name}.scale"], zero, tuple(shape), bits)


def stored(codes: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """`QTensor.qdata` of signed codes (N, ...): the inverse of `QTensor.codes`."""
    if zero_point is None:
        return codes.to(torch.int8)
    rows = codes.flatten(1).to(torch.int16) + zero_point.to(torch.int16)[:, None]
    return numerics.pack_int4(rows.to(torch.uint8)) if bits <= 4 else rows.to(torch.uint8)


def layout(
    name: str, shape: tuple[int, ...], form: Format
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each of `QTensor.tensors(name)`, for a weight of `shape` in `form`."""
    size = math.prod(shape[1:])
    if form.symmetric and form.bits > 4:
        return {f"{name}.qdata": (torch.int8, shape), f"{name}.scale": (torch.float32, shape[:1])}
    columns = (size + 1) // 2 if form.bits <= 4 else size
    return {
        f"{name}.qdata": (torch.uint8, (shape[0], columns)),
        f"{name}.scale": (torch.float32, shape[:1]),
        f"{name}.zero_point": (torch.uint8, shape[:1]),
    }
