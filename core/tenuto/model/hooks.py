"""Hooks of diffusers and accelerate on a model: caches, offloading, casting.

They replace the forwards of modules by functions that know the module they were made for: a deep
copy would run the blocks of the original. Nothing here imports either library.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .elsewhere import Weights
from .own_family import described_like
from .patches import patch_of

GROUPS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
CAST = "layerwise_casting"


def private_copy(model: nn.Module, empty: Iterable[str] | None = None) -> nn.Module:
    """A deep copy without the hooks of diffusers and accelerate: it computes everything itself.

    empty: the names of submodules whose parameters are meta tensors in the copy, without memory;
    the model's own may be so too then. ModelError where the weights are not in the model itself,
    see `check_weights`.
    """
    check_weights(model, hooked=empty is not None)
    modules = list(model.modules())
    gone = _Gone()
    memo: dict[int, Any] = _emptied(model, empty or ())
    for module in modules:
        for name in ("_diffusers_hook", "_hf_hook"):
            if name in vars(module):
                memo[id(vars(module)[name])] = gone
        memo |= {id(forward): gone for forward in _forwards(module) if _is_hook(forward)}
    twin = copy.deepcopy(model, memo)
    for module in modules:
        _unhook(module, memo[id(module)], memo)
    if getattr(twin, "_cache_config", None) is not None:
        vars(twin)["_cache_config"] = None
        vars(twin).pop("_run_decoder_stack", None)  # SeaCache's, on Cosmos
    described_like(twin, model)
    return twin


def _emptied(model: nn.Module, names: Iterable[str]) -> dict[int, Any]:
    """A memo for deepcopy with a meta parameter for each that only these submodules have."""
    names = tuple(names)
    inside = [model.get_submodule(name) for name in names]
    prefixes = tuple(f"{name}." for name in names)
    whole = model.named_parameters(remove_duplicate=False)
    shared = {id(p) for name, p in whole if not name.startswith(prefixes)}
    found: dict[int, Any] = {}
    for parameter in (p for part in inside for p in part.parameters()):
        if id(parameter) not in shared:
            twin = torch.empty_like(parameter, device="meta")
            found[id(parameter)] = nn.Parameter(twin, requires_grad=parameter.requires_grad)
    return found


def cache_on(model: nn.Module) -> str | None:
    """The cache of diffusers that is on, such as "FasterCache"; None: none is."""
    config = getattr(model, "_cache_config", None)
    return None if config is None else type(config).__name__.removesuffix("Config")


def refuse_cache(model: nn.Module, what: str) -> None:
    """ModelError if a cache of diffusers is on, with which `what` would mean nothing."""
    found = cache_on(model)
    if found is not None:
        raise ModelError(
            f"The {found} of diffusers is on, and {what} needs the model without it: call "
            "disable_cache() first."
        )


def check_weights(model: nn.Module, hooked: bool = False) -> None:
    """ModelError in one sentence if hooks keep the model's weights elsewhere, or in float8.

    hooked: weights that accelerate's hooks load when they are needed will do.
    """
    known = Weights(model) if hooked else None
    if any(p.is_meta and (known is None or p not in known) for p in model.parameters()):
        raise ModelError(
            "The model's weights are offloaded until they are called: take sequential offloading "
            "off (pipe.remove_all_hooks()), and turn it on after attaching."
        )
    names = {
        name
        for module in model.modules()
        for name in getattr(vars(module).get("_diffusers_hook"), "hooks", ())
    }
    if names & set(GROUPS):
        raise ModelError(
            "Group offloading is on, which moves the weights that it has seen and no others: load "
            "the model without it, and turn it on after attaching."
        )
    if CAST in names:
        raise ModelError(
            "Layerwise casting is on, which has rounded the weights: load the model without it, "
            "and turn it on after attaching if at all."
        )


def check_fused(model: nn.Module) -> None:
    """ModelError in one sentence if query, key and value are computed by one layer of diffusers'.

    What an artifact has codes of is then not called.
    """
    if any(_fused(module) for module in model.modules()):
        raise ModelError(
            "The model's projections are fused, and artifacts know them apart: call "
            "unfuse_qkv_projections() first."
        )


def _fused(module: nn.Module) -> bool:
    """Whether an attention module of diffusers computes with its fused layers."""
    if not getattr(module, "fused_projections", False):
        return False
    processor = getattr(module, "processor", None)
    by_processor = type(module).__module__ == "diffusers.models.attention_processor"
    return not by_processor or type(processor).__name__.startswith("Fused")


class _Gone:
    """In a copy, where a hook was."""


def _is_hook(forward: Any) -> bool:
    """Whether a hook of diffusers or accelerate made `forward`."""
    place = str(getattr(getattr(forward, "func", None), "__module__", ""))
    return place.startswith(("diffusers.hooks", "accelerate.hooks"))


def _beneath(module: nn.Module, forward: Any) -> Any:
    """What one hook, or all those of diffusers, lie upon."""
    if forward.func.__module__.startswith("accelerate"):
        return vars(module).get("_old_forward")
    lowest = vars(module)["_diffusers_hook"]._fn_refs[0]
    return lowest.original_forward or lowest.forward


def _forwards(module: nn.Module) -> Iterator[Any]:
    """Every forward of one instance, the outermost first, down to that of the class."""
    found = vars(module).get("forward")
    while found is not None:
        yield found
        patch = patch_of(found)
        if patch is not None:
            found = patch.before
        else:
            found = _beneath(module, found) if _is_hook(found) else None


def _unhook(module: nn.Module, twin: nn.Module, memo: dict[int, Any]) -> None:
    """Give `twin`, the copy of `module`, the forwards beneath the hooks."""
    own = [f for f in _forwards(module) if not _is_hook(f)]
    own = [f for f in own if getattr(f, "__func__", None) is not type(module).forward]
    for name in ("_diffusers_hook", "_hf_hook", "_old_forward", "forward"):
        vars(twin).pop(name, None)
    before = None
    for forward in reversed(own):
        copied = copy.deepcopy(forward, memo)
        patch = patch_of(copied)
        if patch is not None:
            patch.before = before
        before = copied
    if before is not None:
        vars(twin)["forward"] = before
