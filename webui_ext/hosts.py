"""What differs between A1111, Forge, Forge Neo and reForge: features are tested, not versions."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tenuto.errors import ModelError
from tenuto.model import computes_as_torch, describe, names_in_host

PREFIX = "diffusion_model."
NUNCHAKU = ("Nunchaku", "SVDQ")  # Forge Neo's classes round its kernels
_known: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def detect() -> str:
    """ "a1111", "forge" (Neo too), "forge-legacy" (reForge and old Forge) or "sdnext"."""
    if _there("modules.sd_offload") or _there("modules.sdnq"):
        return "sdnext"
    if not _there("modules_forge"):
        return "a1111"
    return "forge" if _there("backend.patcher") else "forge-legacy"


def _there(name: str) -> bool:
    """Whether the host has this module; a parent that is missing is no error."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return name in sys.modules


def patcher_of(sd_model: Any) -> Any:
    """Forge's and reForge's UnetPatcher; None in A1111."""
    return getattr(getattr(sd_model, "forge_objects", None), "unet", None)


def denoiser_of(sd_model: Any) -> nn.Module:
    """The network that is called once a step; ModelError where the host has none of that kind."""
    if isinstance(sd_model, nn.Module) and not hasattr(sd_model, "model"):
        return sd_model
    patcher = patcher_of(sd_model)
    found = getattr(patcher if patcher is not None else sd_model, "model", None)
    found = getattr(found, "diffusion_model", None)
    if not isinstance(found, nn.Module):
        raise ModelError(f"Tenuto finds no denoiser in a {type(sd_model).__name__}.")
    return found


def sampling_of(sd_model: Any) -> Any:
    """What knows the noise at a timestep: Forge's predictor, reForge's sampling, A1111's model."""
    model = getattr(patcher_of(sd_model), "model", None)
    found = (getattr(model, name, None) for name in ("predictor", "model_sampling"))
    return next((one for one in found if one is not None), sd_model)


def timesteps(sd_model: Any, sampler: Any, sigmas: Tensor) -> Tensor:
    """What the network gets at `sigmas` (n,): Forge and reForge round, A1111 does not."""
    known = sampling_of(sd_model)
    if known is not sd_model:
        return known.timestep(sigmas)
    return sampler.model_wrap_cfg.inner_model.sigma_to_t(sigmas)


def is_linear(module: nn.Module) -> bool:
    """Forge's Linear is no nn.Linear."""
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Linear" and hasattr(module, "in_features")
    )


def layers(denoiser: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every Linear and Conv2d with a weight that computes as torch's."""
    for name, module in denoiser.named_modules():
        torchs = isinstance(module, nn.Linear | nn.Conv2d)
        known = computes_as_torch(module) if torchs else is_linear(module)
        if known and getattr(module, "weight", None) is not None:
            yield name, module


def objection(denoiser: nn.Module) -> str | None:
    """Why layers cannot be quantized in this host now, in one sentence; None where they can."""
    modules = sys.modules.get("modules.sd_unet")
    if getattr(modules, "current_unet", None) is not None:
        return "Precision is off: an SD-Unet stands in for the model."
    for layer in denoiser.modules():
        known = isinstance(layer, nn.Conv2d) or is_linear(layer)
        known = known or type(layer).__name__ == "Linear"  # Neo's for gguf does not tell its size
        kind = _stored_low(layer) if known and getattr(layer, "weight", None) is not None else None
        if kind is not None:
            return f"Precision is off: the host stores the weights in {kind}."
    if any(kind.__name__.startswith(NUNCHAKU) for kind in type(denoiser).__mro__):
        return "Precision is off: the host stores the weights in Nunchaku's 4 bits."
    if not known_parts(denoiser):
        return f"Precision is off: Tenuto does not know the parts of a {_kind(denoiser)} yet."
    return None


def known_parts(denoiser: nn.Module) -> bool:
    """Whether a family says what `denoiser` is made of: else nothing in it is quantized or reused.

    A class that a host derives from a known one, with parts of its own, is not.
    """
    if denoiser not in _known:  # it takes a moment, and every image asks
        try:
            named = names_in_host(denoiser) is not None
            _known[denoiser] = named or describe(denoiser).family != "generic"
        except (ModelError, AttributeError):  # the second where gguf has no sizes
            _known[denoiser] = False
    return _known[denoiser]


def _kind(denoiser: nn.Module) -> str:
    return type(denoiser).__name__.removeprefix("Integrated")


def replaced() -> bool:
    """Whether an SD-Unet (TensorRT) computes in place of the model: then nothing acts."""
    return getattr(sys.modules.get("modules.sd_unet"), "current_unet", None) is not None


def _stored_low(layer: Any) -> str | None:
    """What a layer's weight is stored in, if in fewer than 16 bits."""
    weight = layer.weight
    if getattr(layer, "layout_type", None) is not None:  # of a checkpoint that says `comfy_quant`
        return str(getattr(layer, "quant_format", None) or layer.layout_type)
    if getattr(layer, "quant_state", None) is not None or hasattr(weight, "bnb_quantized"):
        return "nf4 or fp4"
    if getattr(weight, "quant_state", None) is not None:
        return "nf4 or fp4"
    if getattr(weight, "gguf_cls", None) is not None:
        return "gguf"
    if getattr(layer, "fp16_weight", None) is not None or str(weight.dtype).startswith(
        "torch.float8"
    ):
        return "fp8"
    return None if weight.is_floating_point() else str(weight.dtype).removeprefix("torch.")


def version_of(tensor: Tensor) -> tuple[int, int]:
    """Changes when a weight does. Forge computes in inference mode, where none are counted."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def autocast(x: Tensor) -> Tensor:
    """`x` as a layer of the host would take it under its autocast."""
    return x.to(cast_dtype(x))


def cast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of it."""
    if x.is_cuda and torch.is_autocast_enabled() and x.is_floating_point():
        return torch.get_autocast_gpu_dtype()
    return x.dtype
