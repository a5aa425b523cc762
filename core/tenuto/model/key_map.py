"""`KeyMap`: where what has a canonical (diffusers) name is in a host's model.

A host may fuse layers that share an input into one (query, key and value), and may swap the halves
of a modulation (scale and shift). A family writes its key map as prefixes; here they are applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .stand_in import StandIn

Target = str | tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Place:
    """Where a canonical parameter is: `name` in the host, the rows [start, stop) of it.

    swapped: its two halves have changed places.
    """

    name: str
    rows: tuple[int, int]
    swapped: bool = False


@dataclass(frozen=True)
class KeyMap:
    """Canonical names of a host's denoiser.

    model_class: the diffusers class whose names are meant. places: canonical parameter -> Place.
    modules: canonical module -> the host's modules, one for each of its outputs. rising: the
    canonical timestep goes from 0 to 1 while the host's denoiser gets 1 less it.
    """

    model_class: str
    places: dict[str, Place]
    modules: dict[str, tuple[str, ...]]
    rising: bool = False

    def times(self, timesteps: Iterable[float]) -> list[float]:
        """Canonical timesteps as the host counts them, or the host's as canonical ones."""
        return [1 - t if self.rising else t for t in timesteps]

    def module(self, name: str) -> tuple[str, ...]:
        """The host's module (or modules, one an output) of a canonical one; ModelError if none."""
        place = self.places.get(f"{name}.weight")
        if not name:
            return ("",)  # the model itself
        if name in self.modules:
            return self.modules[name]
        if place is None:
            raise ModelError(f"This host has no module of its own for {name}.")
        return (place.name.removesuffix(".weight"),)

    def canonical(self, host: str) -> str:
        """The canonical name of a host's module; the host's own where it has no other."""
        found = (n for n, hosts in self.modules.items() if host in hosts)
        whole = (n for n, p in self.places.items() if p.name == f"{host}.weight")
        return next(found, next(whole, f"{host}.weight").removesuffix(".weight"))

    def layers(self) -> dict[str, list[str]]:
        """The host's layer -> the canonical ones that are fused in it, in the order of the rows."""
        found: dict[str, list[tuple[int, str]]] = {}
        for name, place in self.places.items():
            if name.endswith(".weight"):
                host = place.name.removesuffix(".weight")
                found.setdefault(host, []).append((place.rows[0], name.removesuffix(".weight")))
        return {host: [name for _, name in sorted(parts)] for host, parts in found.items()}

    def view(self, denoiser: nn.Module, tensor: Callable[[str], Tensor] | None = None) -> nn.Module:
        """Modules with canonical names that hold the host's own weights: to look at, not to run.

        tensor: gives a parameter by the host's name where it is not the model's own.
        """
        root = type(self.model_class, (_View,), {})()
        for name, place in self.places.items():
            own = denoiser.get_parameter(place.name) if tensor is None else tensor(place.name)
            value = own.detach()[slice(*place.rows)]
            value = swapped(value) if place.swapped else value
            leaf, _, end = name.rpartition(".")
            kind = denoiser.get_submodule(place.name.rpartition(".")[0])
            parent = _inside(root, leaf, kind)
            parent.register_parameter(end, nn.Parameter(value, requires_grad=False))
        return root


class _View(nn.ModuleDict):
    """A place for modules: it has a length, and its parts by name."""


def _inside(root: nn.Module, name: str, kind: nn.Module) -> nn.Module:
    """The module `name` of a view, made where it is not there yet: of the host's kind, empty."""
    parent, _, key = name.rpartition(".")
    holder = _inside(root, parent, nn.Module()) if parent else root
    if not name:
        return root
    if key not in holder._modules:
        holder.add_module(key, _empty(kind))
    return holder.get_submodule(key)


def _empty(kind: nn.Module) -> nn.Module:
    if isinstance(kind, nn.Linear):
        return nn.Linear(1, 1, bias=False, device="meta")
    if isinstance(kind, nn.Conv2d):
        return nn.Conv2d(1, 1, 1, bias=False, device="meta")
    return _View()


def swapped(x: Tensor) -> Tensor:
    """`x` (N, ...) with its two halves in each other's place."""
    return torch.cat(x.chunk(2)[::-1])


def keymap(
    denoiser: nn.Module,
    model_class: str,
    prefixes: Mapping[str, Target],
    modules: Mapping[str, tuple[str, ...]],
    swapped: Iterable[str] = (),
    ignored: Iterable[str] = (),
    rising: bool = False,
) -> KeyMap:
    """The key map that `prefixes` (host -> canonical; the longest that fits counts) stand for.

    A target that is a tuple of (canonical, rows) is fused. swapped: the host's prefixes with
    swapped halves. ignored: parameters without a counterpart. rising: as in `KeyMap`. ModelError
    where one is left over. Of a `StandIn`, the places of what it stands for.
    """
    places: dict[str, Place] = {}
    swapped, ignored = set(swapped), tuple(ignored)
    if isinstance(denoiser, StandIn) and denoiser.own is not None:
        places = _sought(denoiser.own, prefixes, swapped)
        kept = {n: h for n, h in modules.items() if all(_holds(places, host) for host in h)}
        return KeyMap(model_class, places, kept, rising)
    for name, parameter in denoiser.named_parameters():
        if name.startswith(ignored):
            continue
        prefix = _longest(name, prefixes)
        if prefix is None:
            raise ModelError(
                f"{type(denoiser).__name__} has {name}, which Tenuto has no canonical name for."
            )
        target, rest = prefixes[prefix], name[len(prefix) :]
        start = 0
        size = len(parameter) if parameter.ndim else 1
        for canonical, rows in ((target, size),) if isinstance(target, str) else target:
            place = Place(name, (start, start + rows), prefix in swapped)
            places[f"{canonical}{rest}".removeprefix(".")] = place
            start += rows
    have: dict[str, Any] = dict(denoiser.named_modules())
    kept = {name: hosts for name, hosts in modules.items() if all(h in have for h in hosts)}
    return KeyMap(model_class, places, kept, rising)


def _longest(name: str, prefixes: Mapping[str, Any]) -> str | None:
    """The longest of `prefixes` that is `name` or one of the modules that hold it."""
    while name not in prefixes:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def _sought(own: nn.Module, prefixes: Mapping[str, Target], swapped: set[str]) -> dict[str, Place]:
    """The place of each parameter of a diffusers model, and of what else its files have.

    Of several names that a host may have, the first. ModelError where a parameter has none.
    """
    targets: dict[str, tuple[str, int, int]] = {}  # canonical -> host, first row, rows
    for host, target in prefixes.items():
        start = 0
        for canonical, rows in ((target, 0),) if isinstance(target, str) else target:
            targets.setdefault(canonical, (host, start, rows))
            start += rows
    places: dict[str, Place] = {}
    known = dict(own.named_parameters())
    for name, tensor in own.state_dict().items():
        prefix = _longest(name, targets)
        size = len(tensor) if tensor.ndim else 1
        if prefix is None and name not in known:
            continue  # a buffer that a host makes itself
        if prefix is None or targets[prefix][2] not in (0, size):
            raise ModelError(
                f"{type(own).__name__} has {name}, which hosts have no place for that Tenuto knows."
            )
        host, start, _ = targets[prefix]
        rest = name[len(prefix) :]
        places[name] = Place(host + rest, (start, start + size), host in swapped)
    return places


def _holds(places: Mapping[str, Place], host: str) -> bool:
    return any(place.name.startswith(f"{host}.") for place in places.values())
