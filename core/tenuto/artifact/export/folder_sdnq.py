"""Layers of a diffusers folder as SDNQ has them: linears and convolutions in 8 bits.

SDNQ (0.2.8 was run) reads codes under the layer's own name and a scale beside them. It computes
with dequantized weights; `sdnq.loader.apply_sdnq_options_to_model` makes it quantize inputs.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...model import own_modules
from ...numerics import QTensor
from .plan import Plan
from .tensors_file import Spec

KIND, HOST = (
    "sdnq int8",
    "diffusers >= 0.36 with sdnq >= 0.2.8, imported before the model is loaded",
)
CONVOLUTIONS = True
CODED = (nn.Linear, nn.modules.conv._ConvNd)  # what SDNQ replaces where nothing says otherwise


def specs(layer: str, shape: tuple[int, ...]) -> dict[str, Spec]:
    """Types and shapes of a layer's tensors: a scale a row, of a convolution one a tap."""
    taps = (shape[0], 1, *shape[2:])
    return {f"{layer}.weight": (torch.int8, shape), f"{layer}.scale": (torch.float32, taps)}


def tensors(layer: str, codes: QTensor) -> dict[str, Tensor]:
    """A layer's tensors; codes: symmetric, int8, a scale a row."""
    _, (_, taps) = specs(layer, codes.shape).values()
    scale = codes.scale.view(-1, *[1] * (len(taps) - 1)).expand(taps)
    return {f"{layer}.weight": codes.qdata.view(codes.shape), f"{layer}.scale": scale.contiguous()}


def decoded(layer: str, read: Mapping[str, Tensor]) -> Tensor:
    """The weight that these tensors stand for, fp32."""
    return read[f"{layer}.weight"].float() * read[f"{layer}.scale"]


def header(plan: Plan, layers: Container[str], dynamic: bool) -> dict[str, str]:
    """Of the file: SDNQ asks for nothing."""
    return {"format": "pt"}


def config(plan: Plan, layers: frozenset[str], dynamic: bool) -> dict[str, Any]:
    """The `quantization_config` of config.json: what is not named is in codes."""
    every = (name for name, module in own_modules(plan.denoiser) if isinstance(module, CODED))
    return {
        "quant_method": "sdnq", "weights_dtype": "int8", "group_size": -1, "quant_conv": True,
        "quant_embedding": False, "use_quantized_matmul": False, "use_svd": False,
        "use_hadamard": False, "dequantize_fp32": True, "is_training": False,
        "add_skip_keys": False, "minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0,
        "modules_to_not_convert": sorted(f"{name}.weight" for name in every if name not in layers),
    }  # fmt: skip
