"""One model family a file: which classes it covers and what such a denoiser is made of.

A family file has `CLASSES` (class names, never classes: nothing is imported) and
`describe(module) -> Backbone`. One that hosts have under other names has `HOSTS` (class names) and
`key_map(module) -> KeyMap` too, or None where a class of that name is another family's; with
`stand_in(module) -> StandIn` a diffusers model's files can be written under the hosts' names.
`generic.py` serves what no family covers. Another distribution adds a family as an entry point of
the group "tenuto.families" that names such a module. The most derived class that a family names
decides; of one class, the family here goes first. What a user says of one module (`describing`)
goes before all of them.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from torch import nn

from ...errors import ModelError
from ...resources import found
from ..backbone import Backbone, Branch, Subset
from ..key_map import KeyMap, Place
from ..own_family import own_family
from ..signature import STEP_NAMES


def families() -> dict[str, ModuleType]:
    """Every family file by name."""
    return {n: m for n, m in found(__name__).items() if hasattr(m, "CLASSES")}


def _covering(module: nn.Module, attribute: str) -> Iterator[ModuleType]:
    """The families that list the class of `module`, then those of what it derives from."""
    for kind in (cls.__name__ for cls in type(module).__mro__):
        yield from (f for f in families().values() if kind in getattr(f, attribute, ()))
        further = (entry.load() for entry in _installed(tuple(sys.path)))
        yield from (f for f in further if kind in getattr(f, attribute, ()))


@functools.lru_cache(maxsize=1)
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The families that distributions on this `sys.path` bring: to look takes 30 ms."""
    return tuple(entry_points(group="tenuto.families"))


def key_map_of(module: nn.Module) -> KeyMap | None:
    """The key map of a host's denoiser; None where its own names are the canonical ones.

    ModelError if the class is a host's, and something in it has no canonical name. What derives
    from such a class and has parts of its own is another model.
    """
    maps = (_mapped(family, module) for family in _covering(module, "HOSTS"))
    return next((found for found in maps if found is not None), None)


def _mapped(family: ModuleType, module: nn.Module) -> KeyMap | None:
    try:
        return family.key_map(module)
    except ModelError:
        if type(module).__name__ in family.HOSTS:
            raise
        return None


def hosts_of(module: nn.Module) -> tuple[str, ...]:
    """The classes of hosts that take an artifact of `module`: by a key map, or under equal names.

    `SAME_IN_HOSTS` of a family file lists the classes that a host has under the same names.
    """
    family = next(_covering(module, "CLASSES"), None)
    if own_family(module) is not None:
        return ()
    if type(module).__name__ in getattr(family, "SAME_IN_HOSTS", ()):
        return (type(module).__name__,)
    return tuple(getattr(family, "HOSTS", ()))


def host_map_of(module: nn.Module) -> KeyMap:
    """Where each parameter of a diffusers model is in the files of hosts.

    ModelError where no host is known that reads such a model, or not under which names.
    """
    kind, family = type(module).__name__, next(_covering(module, "CLASSES"), None)
    if kind in getattr(family, "SAME_IN_HOSTS", ()):
        return same_names(module)
    if family is None or not hasattr(family, "stand_in") or own_family(module) is not None:
        raise ModelError(f"Tenuto does not know under which names hosts have a {kind}.")
    found = family.key_map(family.stand_in(module))
    if found is None:
        raise ModelError(f"This {kind} is in no host that Tenuto knows.")
    return found


def names_in_host(module: nn.Module) -> KeyMap | None:
    """The key map of a host's denoiser, also of one that has the canonical names itself.

    None where no family knows the host's class; ModelError as `key_map_of`.
    """
    found = key_map_of(module)
    if found is not None or own_family(module) is not None:
        return found
    family = next(_covering(module, "CLASSES"), None)
    same = type(module).__name__ in getattr(family, "SAME_IN_HOSTS", ())
    return same_names(module) if same else None


def same_names(module: nn.Module) -> KeyMap:
    """The key map that changes nothing."""
    sizes = {n: len(t) if t.ndim else 1 for n, t in module.state_dict().items()}
    places = {name: Place(name, (0, size)) for name, size in sizes.items()}
    return KeyMap(type(module).__name__, places, {n: (n,) for n, _ in module.named_modules() if n})


def describe(module: nn.Module) -> Backbone:
    """What `module` is made of, in its own names; ModelError if nothing in it can be quantized."""
    own = own_family(module)
    if own is not None:
        return own
    for family in _covering(module, "CLASSES"):
        return family.describe(module)
    keys = key_map_of(module)
    if keys is not None:
        return _in_host(describe(keys.view(module)), keys)
    codes = all(callable(getattr(module, name, None)) for name in ("encode", "decode"))
    if codes and not set(STEP_NAMES) & set(inspect.signature(type(module).forward).parameters):
        raise ModelError(f"{type(module).__name__} is an autoencoder, where a denoiser is meant.")
    backbone = found(__name__)["generic"].describe(module)
    if not backbone.blocks:
        raise ModelError(
            f"{type(module).__name__} is no denoiser that Tenuto knows: it has no list of blocks. "
            "Give the denoiser or its pipeline, or say with `describe=` what the model is made of."
        )
    return backbone


def _in_host(backbone: Backbone, keys: KeyMap) -> Backbone:
    """A canonical description in a host's names; patterns become the layers that match them."""

    def own(name: str) -> str:
        return keys.module(name)[0]

    def matching(patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            host
            for host, parts in keys.layers().items()
            if any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in patterns)
        )

    subsets = (tuple(dict.fromkeys(map(own, s.linears))) for s in backbone.subsets)
    return Backbone(
        backbone.family,
        tuple(map(own, backbone.blocks)),
        tuple(Branch(own(b.name), b.kind, own(b.block)) for b in backbone.branches),
        tuple(Subset(linears) for linears in subsets if len(linears) > 1),
        tuple(host for name in backbone.temporal for host in keys.module(name)),
        matching(backbone.ends),
        matching(backbone.keep),
    )
