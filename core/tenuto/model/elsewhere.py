"""Weights that a hook of accelerate loads when a module is called: how to read them one at a time.

Such a model has meta tensors in their place, which know shape and type and have no values. Nothing
here imports accelerate: a hook is known by its `weights_map`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Weights:
    """The values of a model's parameters and buffers, wherever they are."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, tuple[Tensor, Mapping[str, Any], str]] = {}
        for module in model.modules():
            for hook in _loading_hooks(module):
                for name, tensor in _tensors(module, bool(hook.place_submodules)):
                    if tensor.is_meta:
                        self._places.setdefault(id(tensor), (tensor, hook.weights_map, name))

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether the values of a tensor of the model can be had."""
        return not tensor.is_meta or id(tensor) in self._places

    def __call__(self, tensor: Tensor) -> Tensor:
        """The values of a tensor of the model: itself, or read, in the type that it stands for."""
        if not tensor.is_meta:
            return tensor.detach()
        _, weights, name = self._places[id(tensor)]
        return weights[name].detach().to(tensor.dtype)


def _loading_hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate on one module that load weights, those in a sequence too."""
    first = vars(module).get("_hf_hook")
    for hook in getattr(first, "hooks", (first,)):
        if getattr(hook, "offload", False) and isinstance(
            getattr(hook, "weights_map", None), Mapping
        ):
            yield hook


def _tensors(module: nn.Module, whole: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=whole)
    yield from module.named_buffers(recurse=whole)
