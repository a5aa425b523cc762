"""Nested containers, as models take and return them: find the tensors in them, or replace them.

Containers are dicts and other mappings, lists, tuples, named tuples and dataclasses; what models of
transformers and diffusers return is a dict and a dataclass in one. Everything else is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

Leaf = Callable[[Any, str], Any]
Map = Callable[[Tensor], Tensor]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif _is_dataclass(value):
        for _, item in _fields(value):
            yield from tensors_in(item)


def map_tensors(fn: Callable[..., Any], value: Any, *others: Any) -> Any:
    """`value` with `fn(tensor)` for each tensor in it; containers keep their type, leaves stay.

    others: as many tensors in the same order, which `fn` gets too: fn(tensor, *those of others).
    ValueError if one of them has more or fewer.
    """
    if isinstance(value, Tensor) and all(isinstance(other, Tensor) for other in others):
        return fn(value, *others)
    if not others:
        return map_leaves(lambda leaf, _: fn(leaf) if isinstance(leaf, Tensor) else leaf, value)
    found = zip(*map(tensors_in, (value, *others)), strict=True)
    done = iter([fn(*tensors) for tensors in found])
    return map_tensors(lambda _: next(done), value)


def map_leaves(fn: Leaf, value: Any, name: str = "", leaves: tuple[type, ...] = (Tensor,)) -> Any:
    """`value` with fn(leaf, name) for everything in it that is no container.

    name: keys and fields on the way to the leaf, joined by dots; members of a list have its name.
    leaves: what is a leaf whatever its class derives from. A container comes back as its own type
    and as a new one; a dataclass in which nothing changed is returned as it is, and a mapping that
    cannot be written to becomes a dict.
    """

    def each(item: Any, key: Any = None) -> Any:
        return map_leaves(fn, item, name if key is None else f"{name}.{key}", leaves)

    if isinstance(value, leaves):
        return fn(value, name)
    if isinstance(value, Mapping):
        items = {key: each(item, key) for key, item in value.items()}
        return items if type(value) is dict else _refilled(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value._make(map(each, value, value._fields))  # type: ignore[attr-defined]
    if isinstance(value, list | tuple):
        return type(value)([each(item) for item in value])
    if _is_dataclass(value):
        fields = {key: (item, each(item, key)) for key, item in _fields(value)}
        return _changed(value, {k: new for k, (old, new) in fields.items() if new is not old})
    return fn(value, name)


DEEP = 4  # objects in objects that are looked into


def map_held(fn: Map, value: Any, inside: Map | None = None, deep: int = DEEP) -> Any:
    """`map_tensors`, also of tensors that plain objects hold, such as a model's cache of keys.

    Of such an object there is a copy then; whoever goes on writing to it does not change that.
    inside: for the tensors of objects; None: `fn`.
    """
    inside = inside or fn

    def leaf(item: Any, _: str) -> Any:
        if isinstance(item, Tensor):
            return fn(item)
        if not _holds(item, deep):
            return item
        twin = copy.copy(item)
        for name, x in vars(item).items():
            vars(twin)[name] = map_held(inside, x, inside, deep - 1)
        return twin

    return map_leaves(leaf, value)


def _holds(item: Any, deep: int) -> bool:
    """Whether an object that is no container, module or function has a tensor inside."""
    if not deep or callable(item) or isinstance(item, nn.Module) or not hasattr(item, "__dict__"):
        return False
    found: list[bool] = []

    def leaf(x: Any, _: str) -> Any:
        found.append(isinstance(x, Tensor) or _holds(x, deep - 1))
        return x

    map_leaves(leaf, vars(item))
    return any(found)


def _refilled(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A copy of `value` with these items: whatever its class adds stays, attributes follow."""
    if not isinstance(value, MutableMapping):
        return items
    twin = copy.copy(value)
    for key, item in items.items():
        twin[key] = item
    return twin


def _changed(value: Any, fields: dict[str, Any]) -> Any:
    """A copy of a dataclass with other fields, frozen or not; it is not checked again."""
    twin = copy.copy(value) if fields else value
    for name, item in fields.items():
        object.__setattr__(twin, name, item)
    return twin


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass that have a value."""
    names = (field.name for field in dataclasses.fields(value))
    return ((name, getattr(value, name)) for name in names if hasattr(value, name))
