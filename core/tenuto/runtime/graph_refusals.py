"""`refusal_of`: why a model must run as it is, because others do something inside its calls.

A CUDA graph replays kernels and nothing of Python: a hook that moves weights, a cache that decides
as it runs, and a function that watches a layer would all be passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..caching.inner_patches import inner_patch
from ..model import patch_of
from ..model.hooks import CAST, GROUPS
from .temporal_table import TemporalTable

MOVES = "offloading moves its weights"


def refusal_of(model: nn.Module, strict: bool = False) -> str | None:
    """What keeps the calls of `model` from being captured, or None.

    The model's own forward hooks lie round its calls, and are no hindrance; nor is an empty
    registry, which diffusers leaves on a model that a pipeline has run. strict: neither is an
    attention processor of another library welcome, which may keep what it sees.
    """
    modules = list(_modules(model))
    for module in modules:
        for hook in _accelerate(module):
            if _offloads(hook):
                return MOVES
            if module is not model:
                return _lies("a hook of accelerate", module)
        for name in getattr(vars(module).get("_diffusers_hook"), "hooks", ()):
            moved = {CAST: "layerwise casting exchanges its weights"} | dict.fromkeys(GROUPS, MOVES)
            return moved.get(name, f"the hook {name} of diffusers is on")
    for module in modules:
        patch = vars(module).get("forward")
        if patch is not None and not _known(patch) and "_hf_hook" not in vars(module):
            return _lies("another library's patch", module)
        if module is not model and (module._forward_hooks or module._forward_pre_hooks):
            return _lies("a hook", module)
    reader = inner_patch(model) if strict else ""
    return f"the processor of {reader} may keep what it sees" if reader else None


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Those too that a table calls where it has no row."""
    for module in model.modules():
        yield module
        if isinstance(module, TemporalTable):
            for original in module._original:
                yield from original.modules()


def _accelerate(module: nn.Module) -> Iterator[Any]:
    first = vars(module).get("_hf_hook")
    if first is not None:
        yield from getattr(first, "hooks", (first,))


def _offloads(hook: Any) -> bool:
    """Accelerate's hooks of whole models are named so, those of layers say so."""
    return bool(getattr(hook, "offload", False)) or "Offload" in type(hook).__name__


def _known(forward: Any) -> bool:
    """Whether a forward of one instance is ours, down to the class's own."""
    patch = patch_of(forward)
    while patch is not None:
        forward = patch.before
        patch = patch_of(forward)
    return forward is None


def _lies(what: str, module: nn.Module) -> str:
    return f"{what} lies on its {type(module).__name__}"
