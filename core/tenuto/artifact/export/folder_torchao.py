"""Layers of a diffusers folder as torchao has them: linears in 8 bits, a scale a row.

The header of the weights says which tensor is of which class, as torchao 0.16 and newer write it.
Where the artifact quantizes inputs torchao does too, a range a token.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from ...numerics import QTensor
from .plan import Plan
from .tensors_file import Spec

KIND, HOST = "torchao int8", "diffusers >= 0.36 with torchao >= 0.16"
CONVOLUTIONS = False
ENDS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
ROW: dict[str, Any] = {"_type": "PerRow", "_data": {"dim": -1}}
INPUTS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": ROW, "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}  # fmt: skip


def specs(layer: str, shape: tuple[int, ...]) -> dict[str, Spec]:
    """Types and shapes of a layer's tensors."""
    kinds = (torch.int8, shape), (torch.float32, (shape[0], 1)), (torch.int8, (shape[0], 1))
    return {f"{layer}.{end}": spec for end, spec in zip(ENDS, kinds, strict=True)}


def tensors(layer: str, codes: QTensor) -> dict[str, Tensor]:
    """A layer's tensors; codes: symmetric, int8, a scale a row."""
    scale = codes.scale[:, None]
    parts = codes.qdata, scale, torch.zeros_like(scale, dtype=torch.int8)
    return {f"{layer}.{end}": part for end, part in zip(ENDS, parts, strict=True)}


def decoded(layer: str, read: Mapping[str, Tensor]) -> Tensor:
    """The weight that these tensors stand for, fp32."""
    codes, scale, zero = (read[f"{layer}.{end}"].float() for end in ENDS)
    return (codes - zero) * scale


def header(plan: Plan, layers: Container[str], dynamic: bool) -> dict[str, str]:
    """Which class each tensor is of, as torchao reads it."""
    found = {"format": "pt", "tensor_names": json.dumps(list(plan.parts))}
    for host in plan.parts:
        layer = host.removesuffix(".weight")
        about: dict[str, Any] = {"_type": "Tensor"}
        if layer != host and layer in layers:
            data = {
                "act_quant_kwargs": INPUTS if dynamic else None, "reduce_range": False,
                "block_size": [1, plan.shape(host)[1]],
                "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
            }  # fmt: skip
            names = ["zero_point", "qdata", "scale"]
            about = {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": names}
        found[host] = json.dumps(about)
    return found


def config(plan: Plan, layers: frozenset[str], dynamic: bool) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    row = {**ROW, "_version": 1}
    weights = {"group_size": None, "granularity": row, "set_inductor_config": True}
    both = {
        "act_mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "granularity": row,
        "reduce_range": False, "set_inductor_config": True, "weight_only_decode": False,
    }  # fmt: skip
    name = "Int8DynamicActivationInt8WeightConfig" if dynamic else "Int8WeightOnlyConfig"
    kind = {"_type": name, "_version": 2, "_data": both if dynamic else weights}
    return {
        "quant_method": "torchao", "quant_type": {"default": kind},
        "modules_to_not_convert": sorted(plan.linears - layers),
    }  # fmt: skip
