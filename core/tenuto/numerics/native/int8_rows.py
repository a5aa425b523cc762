"""`int8_tensorwise`: 8-bit codes and a scale a row, rotated where a group size divides K.

weight int8 (N, K); weight_scale fp32 (N, 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import SchemeError
from ..qtensor import QTensor
from ..rotation import rotated, size_for
from ..scheme import Format
from .layout import Facts, Layout, Tensors, rotation, taken

NAME = "int8_tensorwise"


def takes(form: Format) -> bool:
    """Whether `form` is kept so: rotated or not."""
    whole = form.dtype == "int" and form.bits == 8 and form.symmetric
    return whole and form.granularity == "channel" and not (form.group or form.smooth)


def pack(q: QTensor) -> dict[str, Tensor]:
    """The tensors of a layer."""
    return {"weight": q.qdata, "weight_scale": q.scale[:, None]}


def facts(q: QTensor) -> dict[str, Any]:
    """What the layer's `comfy_quant` says."""
    if not q.rotation:
        return {"format": NAME}
    return {"format": NAME, "convrot": True, "convrot_groupsize": q.rotation}


def unpack(tensors: Tensors, facts: Facts, shape: Any, form: Format) -> QTensor:
    """The weight of which `pack` made `tensors`."""
    codes, scale, size = _parts(tensors, facts, shape)
    if not takes(form) or size != (size_for(shape[1]) if form.rotate else 0):
        raise SchemeError("The layer is rotated in another way than its format says.")
    return QTensor(codes, scale[:, 0], None, tuple(shape), 8, rotation=size)


def decode(tensors: Tensors, facts: Facts, shape: Any) -> Tensor:
    """The weight (N, K) fp32 that a reader finds in the tensors of a file."""
    codes, scale, size = _parts(tensors, facts, shape)
    return rotated(codes.float() * scale, size)


def _parts(tensors: Tensors, facts: Facts, shape: Any) -> tuple[Tensor, Tensor, int]:
    codes = taken(tensors, "weight", torch.int8, shape)
    scale = taken(tensors, "weight_scale", torch.float32, (shape[0], 1))
    return codes, scale, rotation(facts, 256, shape[1]) if facts.get("convrot") else 0


LAYOUT = Layout(NAME, takes, pack, facts, unpack, decode)
