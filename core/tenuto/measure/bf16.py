"""A denoiser in bf16: the noise floor that stands beside every PSNR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import map_tensors, private_copy

NATIVE, WIDE = "native", "bf16 operands, fp32 products"


def bf16_arithmetic(device: torch.device) -> str:
    """How bf16 is computed there: `NATIVE`, or `WIDE` where the CPU has no fast bf16 product."""
    if device.type != "cpu":
        return NATIVE
    try:
        return NATIVE if torch.ops.mkldnn._is_mkldnn_bf16_supported() else WIDE
    except (AttributeError, RuntimeError):  # a torch built without oneDNN
        return WIDE


def bf16_copy(denoiser: nn.Module, arithmetic: str = NATIVE) -> nn.Module:
    """A copy of `denoiser` with weights and arithmetic in bf16, called as the original is.

    Tensors of two dimensions and more go in as bf16, as a pipeline in bf16 gives them; timesteps
    and guidance stay as they are. The output comes back in the original's dtype. With `WIDE`,
    Linear and Conv2d multiply their bf16 operands in fp32 and round the result to bf16: the
    arithmetic of bf16 units, which add up in fp32, at ten times the speed where there are none.
    """
    weights = (p.dtype for p in denoiser.parameters() if p.is_floating_point())
    dtype = next(weights, torch.float32)
    twin = nn.Module.to(private_copy(denoiser), torch.bfloat16)  # diffusers' own `to` warns
    if arithmetic == WIDE:
        for layer in twin.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                _replace_forward(layer, _wide(layer))
    inner = twin.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors(_lower, (args, kwargs))
        out = inner(*args, **kwargs)
        return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, out)

    _replace_forward(twin, forward)
    return twin


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__dict__["forward"] = forward


def _wide(layer: nn.Linear | nn.Conv2d) -> Callable[..., Tensor]:
    """The forward of `layer` with its products in fp32."""

    def forward(x: Tensor, *_: Any) -> Tensor:
        weight = layer.weight.float()
        bias = None if layer.bias is None else layer.bias.float()
        if isinstance(layer, nn.Linear):
            return F.linear(x.float(), weight, bias).to(x.dtype)
        return layer._conv_forward(x.float(), weight, bias).to(x.dtype)

    return forward


def _lower(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16) if x.is_floating_point() and x.ndim > 1 else x
