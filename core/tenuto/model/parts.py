"""The parts of a diffusers pipeline: its denoisers, its text encoders, their device and dtype."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

MAIN = ("transformer", "unet")
DENOISER = re.compile(r"(?:[a-z]\w*_)?(?:transformer|unet)(?:_\d+)?", re.ASCII)
ENCODER = re.compile(r"text_encoder(?:_\d+)?", re.ASCII)


def denoiser_of(model: Any) -> nn.Module:
    """The denoiser of a diffusers pipeline, the main one of several, or the module itself.

    What `torch.compile` has wrapped is the module inside: its names, its hooks.
    """
    return next(iter(denoisers_of(model).values()))


def denoisers_of(model: Any) -> dict[str, nn.Module]:
    """Every denoiser of a diffusers pipeline by its name there, the main one first.

    `transformer` or `unet`, and those beside it: Wan 2.2 has `transformer_2` for low noise,
    Ideogram 4 `unconditional_transformer`. A module is its own, called "". ModelError if there is
    none.
    """
    if isinstance(model, nn.Module):
        return {"": uncompiled(model)}
    found = _components(model, DENOISER)
    main = next((name for name in MAIN if name in found), next(iter(found), None))
    if main is None:
        raise ModelError(f"{type(model).__name__} has no `transformer` or `unet`.")
    return {main: found.pop(main), **found}


def parts_of(model: Any) -> dict[str, nn.Module]:
    """`denoisers_of`, with "" for the main one: so calls and parts of artifacts are named."""
    (_, main), *further = denoisers_of(model).items()
    return {"": main, **dict(further)}


def _components(model: Any, names: re.Pattern[str]) -> dict[str, nn.Module]:
    """The modules of a pipeline that are called like this, in its own order."""
    known = dict.fromkeys((*MAIN, *getattr(model, "__dict__", ())))
    found = {name: getattr(model, name, None) for name in known if names.fullmatch(name)}
    return {name: uncompiled(part) for name, part in found.items() if isinstance(part, nn.Module)}


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` has wrapped, or `module` itself."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def encoders_of(model: Any) -> dict[str, nn.Module]:
    """The text encoders of a diffusers pipeline by name, in order; none of a bare denoiser."""
    if isinstance(model, nn.Module):
        return {}
    return dict(sorted(_components(model, ENCODER).items()))


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


@contextmanager
def all_frozen(denoisers: Iterable[nn.Module]) -> Iterator[None]:
    """`frozen`, all of them."""
    with ExitStack() as kept:
        for denoiser in denoisers:
            kept.enter_context(frozen(denoiser))
        yield


def device_and_dtype(denoiser: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype of a module's weights; the device of those that are there."""
    floats = (p for p in denoiser.parameters() if p.is_floating_point())
    dtype, there = torch.float32, torch.device("cpu")
    for number, parameter in enumerate(floats):
        dtype = parameter.dtype if number == 0 else dtype
        if not parameter.is_meta:
            return parameter.device, dtype
    return there, dtype
