"""The parts of a diffusers pipeline: its denoiser, its text encoders, their device and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ModelError


def denoiser_of(model: Any) -> nn.Module:
    """The denoiser of a diffusers pipeline (`transformer` or `unet`), or the module itself.

    What `torch.compile` has wrapped is the module inside: its names, its hooks.
    """
    if isinstance(model, nn.Module):
        return uncompiled(model)
    for name in ("transformer", "unet"):
        found = getattr(model, name, None)
        if isinstance(found, nn.Module):
            return uncompiled(found)
    raise ModelError(f"{type(model).__name__} has no `transformer` or `unet`.")


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` has wrapped, or `module` itself."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def encoders_of(model: Any) -> dict[str, nn.Module]:
    """The text encoders of a diffusers pipeline by name; none of a bare denoiser."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    found = {name: getattr(model, name, None) for name in names}
    return {name: uncompiled(part) for name, part in found.items() if isinstance(part, nn.Module)}


@contextmanager
def frozen(denoiser: nn.Module) -> Iterator[nn.Module]:
    """`denoiser` in eval mode without gradients of its weights; both are restored."""
    modes = [(m, m.training) for m in denoiser.modules()]
    grads = [(p, p.requires_grad) for p in denoiser.parameters()]
    denoiser.eval().requires_grad_(False)
    try:
        yield denoiser
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, grad in grads:
            parameter.requires_grad_(grad)


def device_and_dtype(denoiser: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype of a module's weights; the device of those that are there."""
    floats = [p for p in denoiser.parameters() if p.is_floating_point()]
    there = next((p.device for p in floats if not p.is_meta), torch.device("cpu"))
    return there, floats[0].dtype if floats else torch.float32
