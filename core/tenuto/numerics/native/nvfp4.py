"""`nvfp4`: the 4-bit float e2m1, an e4m3 scale for each 16 columns and one for all (`e2m1.py`).

weight uint8 (N', K / 2), N' being N rounded up to 16; weight_scale e4m3, in the order in which
tensor cores read it; weight_scale_2 fp32 (); pre_quant_scale fp32 (K,) where the columns were
multiplied by something: readers multiply the inputs by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import SchemeError
from .. import e2m1, float8
from ..qtensor import QTensor
from ..scheme import Format
from .layout import Facts, Layout, Tensors, taken

NAME = "nvfp4"
TILE = 16


def takes(form: Format) -> bool:
    """Whether `form` is kept so."""
    return form.dtype == "e2m1"


def pack(q: QTensor) -> dict[str, Tensor]:
    """The tensors of a layer; SchemeError where the rows have scales of their own."""
    assert q.step is not None
    if not bool((q.scale == q.scale[0]).all()):
        raise SchemeError("nvfp4 has one scale for all rows of a weight.")
    short = -q.shape[0] % TILE
    found = {
        "weight": pad(q.qdata, (0, 0, 0, short)),
        "weight_scale": swizzled(pad(q.step, (0, 0, 0, short))).view(float8.CODES),
        "weight_scale_2": q.scale[0].clone(),
    }
    if q.channel is not None:
        found["pre_quant_scale"] = q.channel.reciprocal()
    return found


def facts(q: QTensor) -> dict[str, Any]:
    """What the layer's `comfy_quant` says."""
    return {"format": NAME}


def unpack(tensors: Tensors, facts: Facts, shape: Any, form: Format) -> QTensor:
    """The weight of which `pack` made `tensors`."""
    codes, step, scale = _parts(tensors, shape)
    channel = _channel(tensors, shape)
    if not takes(form) or (channel is not None) != form.smooth:
        raise SchemeError("The layer has or lacks a scale per column.")
    facts_of = step, 16, None if channel is None else channel.reciprocal(), form.dtype
    return QTensor(codes, scale.repeat(shape[0]), None, tuple(shape), 4, *facts_of)


def decode(tensors: Tensors, facts: Facts, shape: Any) -> Tensor:
    """The weight (N, K) fp32 that a reader finds in the tensors of a file."""
    codes, step, scale = _parts(tensors, shape)
    wide = float8.numbers(step).repeat_interleave(TILE, 1)
    value = e2m1.value(e2m1.levels(codes, shape[1], 4), wide, scale, 4)
    channel = _channel(tensors, shape)
    return value if channel is None else value * channel


def swizzled(steps: Tensor) -> Tensor:
    """Scales (R, C) as tensor cores read them: tiles of 128 rows and 4 columns, padded by zeros.

    Of a tile, row 32 a + b and column c are at 16 b + 4 a + c.
    """
    rows, columns = steps.shape
    full = pad(steps, (0, -columns % 4, 0, -rows % 128))
    tiles = full.view(len(full) // 128, 4, 32, full.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(full.shape)


def straight(steps: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzled`: (rows, columns)."""
    full = steps.shape
    tiles = steps.reshape(full[0] // 128, full[1] // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(full)[:rows, :columns].contiguous()


def _parts(tensors: Tensors, shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and steps as bytes, the scale."""
    rows, columns = shape
    if columns % TILE:
        raise SchemeError(f"A weight of {rows} x {columns} has no codes in {NAME}.")
    high, groups = rows + -rows % TILE, columns // TILE
    codes = taken(tensors, "weight", torch.uint8, (high, columns // 2))
    size = high + -high % 128, groups + -groups % 4
    step = float8.bits_of(taken(tensors, "weight_scale", float8.CODES, size))
    scale = taken(tensors, "weight_scale_2", torch.float32, ())
    return codes[:rows].contiguous(), straight(step, rows, groups), scale


def _channel(tensors: Tensors, shape: Any) -> Tensor | None:
    if "pre_quant_scale" not in tensors:
        return None
    return taken(tensors, "pre_quant_scale", torch.float32, shape[1:])


LAYOUT = Layout(NAME, takes, pack, facts, unpack, decode)
