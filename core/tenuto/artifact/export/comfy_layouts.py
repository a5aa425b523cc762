"""How one layer lies in a file of ComfyUI's `comfy_quant`: a layout an entry of `LAYOUTS`.

A layout says which tensors a layer of some shape has, makes them from an artifact's codes or from
the float weight, and gives the weight that they are meant to stand for, computed from the codes and
not from the tensors: `comfy_reader.py` decodes what was written, and the two must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import SchemeError
from ...numerics import Format, QTensor, Scheme, float8, int8_levels, native, schemes
from ...numerics.grid import fits
from ...numerics.rotation import size_for
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
    kept = kept and codes is not None and not codes.rotation and codes.channel is None
    found = codes if kept and codes is not None else QTensor.nearest(weight, Format(8))
    tensors = {"weight": found.qdata, "weight_scale": found.scale[:, None]}
    return Coded(tensors, found.dequantize(), kept)


def _fp8_specs(shape: tuple[int, ...]) -> dict[str, Spec]:
    return {"weight": (float8.CODES, shape), "weight_scale": (torch.float32, ())}


def _fp8(weight: Tensor, codes: QTensor | None) -> Coded:
    """q * s with one scale for all: codes of a scale a row cannot be so, and are found anew."""
    if codes is not None and codes.dtype == "e4m3" and bool((codes.scale == codes.scale[0]).all()):
        tensors = {"weight": codes.qdata.view(float8.CODES), "weight_scale": codes.scale[0].clone()}
        return Coded(tensors, codes.dequantize(), True)
    scale = (weight.abs().amax() / float8.MOST).clamp_min(float8.TINY)
    nearest = float8.cast(weight / scale)
    return Coded({"weight": nearest, "weight_scale": scale}, nearest.float() * scale)


# --- the numbers of `numerics.native` -------------------------------------------------------------


def _native_specs(shape: tuple[int, ...], form: Format) -> dict[str, Spec]:
    """Types and shapes of what `native` packs: see its files."""
    rows, columns = shape
    if form.dtype == "e2m1":
        high, groups = rows + -rows % 16, columns // 16
        steps = high + -high % 128, groups + -groups % 4
        found: dict[str, Spec] = {
            "weight": (torch.uint8, (high, columns // 2)), "weight_scale": (float8.CODES, steps),
            "weight_scale_2": (torch.float32, ()),
        }  # fmt: skip
        return found | ({"pre_quant_scale": (torch.float32, (columns,))} if form.smooth else {})
    if form.dtype == "int":
        return _int8_specs(shape)
    found = {
        "weight": (torch.int8, (rows, int8_levels.width(columns, form.bits))),
        "weight_s_rel": (float8.CODES, (rows, columns // form.group)),
        "weight_s_channel": (torch.float32, (rows,)),
    }
    return found | ({"weight_codebook": (torch.float32, (16,))} if form.bits == 4 else {})


def _native_settings(shape: tuple[int, ...], form: Format) -> dict[str, Any]:
    size = size_for(shape[1])
    if form.dtype == "int8_levels":
        return {"group_size": form.group, "convrot_groupsize": size}
    if form.dtype == "int" and size:
        return {"convrot": True, "convrot_groupsize": size}
    return {}


def _native_fits(shape: tuple[int, ...], form: Format) -> bool:
    """4 and 6 bits are read rotated alone; all else is as it fits the numbers."""
    return fits(shape, form) and (form.dtype != "int8_levels" or size_for(shape[1]) > 0)


def _native_coded(weight: Tensor, codes: QTensor | None, form: Format) -> Coded:
    """An artifact's codes of this format; other ones, and none, are found anew.

    nvfp4 has one scale for all rows, so that codes of parts that a host fuses are rounded once more
    from what they stand for.
    """
    facts = (form.dtype, form.bits, form.group)
    own = codes is not None and (codes.dtype, codes.bits, codes.group) == facts
    own = own and codes is not None and (codes.channel is not None) == form.smooth
    own = own and codes is not None and codes.rotation == size_for(weight.shape[1]) * form.rotate
    apart = own and codes is not None and form.dtype == "e2m1" and len(codes.scale.unique()) > 1
    if own and apart and codes is not None:
        weight = codes.dequantize()
    found = codes if own and not apart and codes is not None else QTensor.nearest(weight, form)
    layout = native.layout_of(form)
    assert layout is not None
    return Coded(layout.pack(found), found.dequantize(), own and not apart)


def native_layout(form: Format) -> Layout:
    """The layout of a format that `numerics.native` has; SchemeError where it has none."""
    known = native.layout_of(form)
    if known is None:
        raise SchemeError(f"ComfyUI reads no weights of {form.bits} bits in {form.dtype}.")
    since = SINCE[form.dtype if form.bits != 6 else "6 bits"]
    return Layout(
        known.format, "0.30" if form.smooth else since, partial(_native_specs, form=form),
        partial(_native_coded, form=form), partial(_native_fits, form=form),
        partial(_native_settings, form=form),
    )  # fmt: skip


SINCE = {"int": "0.27", "int8_levels": "0.31", "6 bits": "0.33", "e2m1": "0.8"}
ROWS = Layout(INT8, "0.27", _int8_specs, _int8)
LAYOUTS: dict[str, Layout] = {  # by what `--scheme` calls them
    "w8a8": ROWS,
    "fp8": Layout(FP8, "0.3.68", _fp8_specs, _fp8),
    "comfy-int8": native_layout(schemes.COMFY_INT8.weight),
    "comfy-w6a8": native_layout(schemes.COMFY_W6A8.weight),
    "comfy-w4a8": native_layout(schemes.COMFY_W4A8.weight),
    "nvfp4": native_layout(schemes.NVFP4.weight),
}


def layout_of(scheme: Scheme) -> Layout:
    """The layout of layers that an artifact has in this scheme.

    Codes in the host's own numbers have theirs, symmetric ones of 5 bits and more are 8-bit ones,
    and what has no place there (a zero point, a scale a row of 8-bit floats) is found anew.
    """
    form = scheme.weight
    if form.dtype == "e4m3":
        return LAYOUTS["fp8"]
    if form.dtype != "int" or form.rotate:
        return native_layout(form)
    return ROWS if form.bits > 4 and form.symmetric else LAYOUTS["comfy-w4a8"]
