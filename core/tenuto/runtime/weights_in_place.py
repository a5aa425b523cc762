"""`InPlaceWeights`: whether a model's weights are still where a CUDA graph reads them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model.adapters import BASE
from .quantized_layer import QLayer

# What torch itself asks before it replays a graph, in builds for CUDA: a hundred times as fast.
_equal: Any = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
EVERY = 64  # calls: after so many the model is walked again in any case


class InPlaceWeights:
    """The addresses of a model's weights, and the state of the adapters round its layers.

    Modules are listed once for many calls, as listing them takes a millisecond; loading an adapter
    or packing a layer lists them again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tensors: list[Tensor] = []
        self._numbers: list[int] = []
        self._layers: list[QLayer] = []
        self._adapters: list[Any] = []
        self._known: tuple[Any, ...] = ()
        self._places: list[int] = []
        self._mark = 0
        self._hooked, self._left = False, 0

    def hooked(self) -> bool:
        """Whether hooks of accelerate or diffusers are on a module of the model."""
        self._listed()
        return self._hooked or _hooked(self.model)

    def state(self) -> tuple[Any, ...]:
        """Equal for two calls that read the same weights in the same way."""
        self._listed()
        if not self._in_place():
            self._places = [x.data_ptr() for x in self._tensors]
            self._mark = hash(tuple(self._places))
        packed = sum([layer.packings for layer in self._layers])
        return self.model.training, self._mark, packed, *map(_adapter, self._adapters)

    def _in_place(self) -> bool:
        """Whether every weight is where it was."""
        if len(self._places) != len(self._tensors):
            return False
        if _equal is not None:
            return _equal(self._tensors, self._places, self._numbers)
        return self._places == [x.data_ptr() for x in self._tensors]

    def _listed(self) -> None:
        known = tuple((getattr(self.model, "peft_config", None) or {}).values())
        same = len(known) == len(self._known) and all(map(operator.is_, known, self._known))
        self._left -= 1
        if self._left >= 0 and same:
            return
        self._left, self._known = EVERY, known
        modules = list(self.model.modules())
        self._hooked = any(map(_hooked, modules))
        self._tensors = [t for module in modules for t in _own(module)]
        self._numbers = list(range(len(self._tensors)))
        self._layers = [m for m in modules if isinstance(m, QLayer)]
        self._adapters = [m for m in modules if hasattr(m, BASE)]


def _hooked(module: nn.Module) -> bool:
    return "_hf_hook" in vars(module) or "_diffusers_hook" in vars(module)


def _own(module: nn.Module) -> Iterator[Tensor]:
    for held in (module._parameters, module._buffers):
        yield from (value for value in held.values() if value is not None)


def _adapter(module: Any) -> tuple[Any, ...]:
    """What of an adapter's layer is set rather than learnt."""
    scaling = getattr(module, "scaling", {})
    merged, off = getattr(module, "merged", False), getattr(module, "disable_adapters", False)
    return tuple(getattr(module, "active_adapters", ())), tuple(scaling.items()), merged, off
