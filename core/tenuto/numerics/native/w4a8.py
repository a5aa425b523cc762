"""`asym_w4a8_int8`: codes of 4 or 6 bits for 8-bit whole numbers, rotated (see `int8_levels.py`).

weight int8 (N, K / 2) or (N, 3 K / 4); weight_s_rel e4m3 (N, K / g); weight_s_channel fp32 (N,);
weight_codebook fp32 (16,), with 4 bits alone: readers that have a fast way for this table ask for
it bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import SchemeError
from .. import float8, int8_levels
from ..grid import fits
from ..qtensor import QTensor
from ..rotation import rotated
from ..scheme import Format
from .layout import Facts, Layout, Tensors, number, rotation, taken

NAME = "asym_w4a8_int8"


def takes(form: Format) -> bool:
    """Whether `form` is kept so."""
    return form.dtype == "int8_levels" and form.rotate


def pack(q: QTensor) -> dict[str, Tensor]:
    """The tensors of a layer."""
    assert q.step is not None
    found = {
        "weight": q.qdata.view(torch.int8),
        "weight_s_rel": q.step.view(float8.CODES),
        "weight_s_channel": q.scale,
    }
    if q.bits == 4:
        found["weight_codebook"] = torch.tensor(int8_levels.TABLE, dtype=torch.float32)
    return found


def facts(q: QTensor) -> dict[str, Any]:
    """What the layer's `comfy_quant` says."""
    return {"format": NAME, "group_size": q.group, "convrot_groupsize": q.rotation}


def unpack(tensors: Tensors, facts: Facts, shape: Any, form: Format) -> QTensor:
    """The weight of which `pack` made `tensors`."""
    bits, codes, step, scale = _parts(tensors, facts, shape)
    size = rotation(facts, 256, shape[1])
    if not takes(form) or bits != form.bits or number(facts, "group_size", 16) != form.group:
        raise SchemeError(f"The layer is not of {form.bits} bits in groups of {form.group}.")
    if bits == 4 and _table(tensors) != int8_levels.TABLE_FP32:
        raise SchemeError("The layer has a table of its own.")
    facts_of = step, form.group, None, form.dtype, size
    return QTensor(codes, scale, None, tuple(shape), bits, *facts_of)


def decode(tensors: Tensors, facts: Facts, shape: Any) -> Tensor:
    """The weight (N, K) fp32 that a reader finds in the tensors of a file."""
    bits, codes, step, scale = _parts(tensors, facts, shape)
    level = int8_levels.levels(codes, shape[1], bits)
    if "weight_codebook" in tensors:
        table = taken(tensors, "weight_codebook", torch.float32, (16,))
        entry = table.to(codes.device)[level.long() + 8]
    else:
        entry = level.float()
    group = number(facts, "group_size", 16)
    wide = float8.numbers(step).repeat_interleave(group, 1)
    value = (entry * wide).round().clamp(-127, 127) * scale[:, None]
    return rotated(value, rotation(facts, 256, shape[1]))


def _parts(tensors: Tensors, facts: Facts, shape: Any) -> tuple[int, Tensor, Tensor, Tensor]:
    """Bits, codes and steps as bytes, scales."""
    rows, columns = shape
    group, weight = number(facts, "group_size", 16), tensors.get("weight")
    bits = 4 if weight is None or weight.shape[-1] * 2 == columns else 6
    form = Format(bits, group=group, dtype="int8_levels", rotate=True)
    if not fits(shape, form):
        raise SchemeError(f"A weight of {rows} x {columns} has no codes of {bits} bits.")
    if bits == 6 and "weight_codebook" in tensors:
        raise SchemeError("A layer with codes of 6 bits has no table.")
    size = (rows, int8_levels.width(columns, bits))
    codes = taken(tensors, "weight", torch.int8, size).view(torch.uint8)
    step = taken(tensors, "weight_s_rel", float8.CODES, (rows, columns // group))
    scale = taken(tensors, "weight_s_channel", torch.float32, (rows,))
    return bits, codes, float8.bits_of(step), scale


def _table(tensors: Tensors) -> tuple[float, ...]:
    return tuple(taken(tensors, "weight_codebook", torch.float32, (16,)).tolist())


LAYOUT = Layout(NAME, takes, pack, facts, unpack, decode)
