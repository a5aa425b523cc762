"""Adapters round a model's layers (LoRA and its kin by PEFT): what lies beneath keeps its names.

PEFT puts a module in place of a layer and the layer inside it, as `base_layer`. What such a module
adds is computed beside the layer, whatever that computes with: a quantized layer too.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

BASE = "base_layer"
FUSED = {"to_qkv": "to_q", "to_kv": "to_k", "to_added_qkv": "add_q_proj"}  # diffusers', beside it
ABOVE = ("encoder_hid_proj.image_projection_layers.",)  # of IP-Adapters


def own_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that is the model's own, once, by the name that it has without adapters."""
    yield from _inside(root, "", set())


def _inside(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    base = getattr(module, BASE, None)
    if isinstance(base, nn.Module):
        yield from _inside(base, name, seen)
        return
    if f"{name}.".startswith(ABOVE) or id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for key, child in module.named_children():
        if not _beside(module, key):
            yield from _inside(child, f"{name}.{key}" if name else key, seen)


def _beside(module: nn.Module, key: str) -> bool:
    """Whether a child is an IP-Adapter's, or made of the projections that it lies beside.

    A model of another code may well have one layer `to_qkv` of its own, and none beside it.
    """
    return key == "processor" or hasattr(module, FUSED.get(key, ""))


def own_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that is the model's own, once, by the name that it has without adapters."""
    seen: set[int] = set()
    for name, module in own_modules(root):
        for key, value in module.named_parameters(recurse=False):
            if id(value) not in seen:
                seen.add(id(value))
                yield f"{name}.{key}" if name else key, value


def adapted(module: nn.Module) -> bool:
    """Whether an adapter lies round anything inside `module`."""
    return any(isinstance(getattr(m, BASE, None), nn.Module) for m in module.modules())


def holder_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the layer `name` as a child, beneath adapters, and the child's name."""
    parent, _, key = name.rpartition(".")
    holder = root.get_submodule(parent)
    while isinstance(getattr(getattr(holder, key), BASE, None), nn.Module):
        holder, key = getattr(holder, key), BASE
    return holder, key
