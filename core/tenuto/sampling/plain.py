"""Nested values as plain data beside their tensors, for a file or for another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

PLAIN = (str, int, float, bool, type(None))


class Packed:
    """Values as plain data, which JSON takes; each tensor becomes ["tensor", key].

    key: of a tensor; those of one key are kept once.
    """

    def __init__(self, key: Callable[[Tensor], str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._key = key

    def put(self, value: Any) -> Any:
        """`value` as plain data; TypeError if something in it is neither plain nor a tensor."""
        if isinstance(value, Tensor):
            key = self._key(value)
            self.tensors[key] = value
            return ["tensor", key]
        if type(value) is dict:
            return ["dict", [[self.put(k), self.put(v)] for k, v in value.items()]]
        if type(value) in (list, tuple):
            return [type(value).__name__, [self.put(v) for v in value]]
        if not isinstance(value, PLAIN):
            raise TypeError(type(value).__name__)
        return ["plain", value]


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `Packed.put` was given."""
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {unpacked(k, tensors): unpacked(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        parts = [unpacked(v, tensors) for v in content]
        return tuple(parts) if kind == "tuple" else parts
    return content
