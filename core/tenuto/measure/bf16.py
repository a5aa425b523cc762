"""A denoiser in bf16: the noise floor that stands beside every PSNR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import device_and_dtype, map_tensors, private_copy
from ..text import printable

NATIVE, WIDE = "native", "bf16 operands, fp32 products"
NONE = "no bf16"  # what a reason begins with


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


def bf16_floor(
    denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[nn.Module | None, str]:
    """(a copy in bf16, its arithmetic), or (None, why not) where it cannot take the call.

    Some models compute in the dtype of their timesteps, which a pipeline in fp32 gives in fp32.
    """
    arithmetic = bf16_arithmetic(device_and_dtype(denoiser)[0])
    twin = bf16_copy(denoiser, arithmetic)
    try:
        with torch.no_grad():
            twin(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        said = str(error).strip().splitlines()[:1]
        return None, f"{NONE}: {printable(' '.join(said), 160)}"
    return twin, arithmetic


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
