"""How one layer lies in a file of ComfyUI's `comfy_quant`: a layout an entry of `LAYOUTS`.

A layout says which tensors a layer of some shape has, makes them from an artifact's codes or from
the float weight, and gives the weight that they are meant to stand for, computed from the codes and
not from the tensors: `comfy_reader.py` decodes what was written, and the two must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...numerics import Format, QTensor, Scheme, float8
from .tensors_file import Spec

INT8, FP8 = "int8_tensorwise", "float8_e4m3fn"  # as the host calls them


@dataclass(frozen=True)
class Coded:
    """One layer as a file has it. tensors: by the end of the name. weight: (N, K) fp32, intended.

    kept: whether these are the artifact's own codes.
    """

    tensors: dict[str, Tensor]
    weight: Tensor
    kept: bool = False


@dataclass(frozen=True)
class Layout:
    """A layout of the host.

    format: its name in `comfy_quant`. since: the first version of ComfyUI that reads it. specs: of
    a shape, type and shape of each tensor. coded: from the float weight and the artifact's codes,
    if any. fits: whether a weight of that shape can be so. settings: further entries of the JSON.
    """

    format: str
    since: str
    specs: Callable[[tuple[int, ...]], dict[str, Spec]]
    coded: Callable[[Tensor, QTensor | None], Coded]
    fits: Callable[[tuple[int, ...]], bool] = field(default=lambda shape: True)
    settings: Callable[[tuple[int, ...]], dict[str, Any]] = field(default=lambda shape: {})


def _int8_specs(shape: tuple[int, ...]) -> dict[str, Spec]:
    return {"weight": (torch.int8, shape), "weight_scale": (torch.float32, (shape[0], 1))}


def _int8(weight: Tensor, codes: QTensor | None) -> Coded:
    """q * s, a scale a row: an artifact's symmetric codes of 5 to 8 bits are such ones."""
    kept = codes is not None and codes.zero_point is None and codes.dtype == "int"
    found = codes if kept and codes is not None else QTensor.nearest(weight, Format(8))
    tensors = {"weight": found.qdata, "weight_scale": found.scale[:, None]}
    return Coded(tensors, found.dequantize(), kept)


def _fp8_specs(shape: tuple[int, ...]) -> dict[str, Spec]:
    return {"weight": (float8.CODES, shape), "weight_scale": (torch.float32, ())}


def _fp8(weight: Tensor, codes: QTensor | None) -> Coded:
    """q * s with one scale for all: codes of a scale a row cannot be so, and are found anew."""
    scale = (weight.abs().amax() / float8.MOST).clamp_min(float8.TINY)
    levels = float8.levels(weight / scale)
    tensors = {"weight": float8.bytes_of(levels).view(float8.CODES), "weight_scale": scale}
    return Coded(tensors, float8.values(levels) * scale)


LAYOUTS: dict[str, Layout] = {  # by what `--scheme` calls them
    "w8a8": Layout(INT8, "0.27", _int8_specs, _int8),
    "fp8": Layout(FP8, "0.3.68", _fp8_specs, _fp8),
}


def layout_of(scheme: Scheme) -> str | None:
    """The layout of layers that an artifact has in this scheme; None where there is none."""
    if scheme.weight.dtype == "e4m3":
        return "fp8"
    wide = scheme.weight.bits > 4
    for name in () if wide else ("comfy-w4a8",):
        if name in LAYOUTS:
            return name
    return "w8a8" if wide else None
