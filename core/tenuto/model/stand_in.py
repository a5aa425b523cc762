"""A host's denoiser where there is none: as much of it as a key map looks at, made of names.

A family file that writes `stand_in(module) -> StandIn` says how a host would divide the diffusers
model `module`; the family's own key map of it then gives every parameter its place in a host's
file. Nothing has values: shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


class StandIn(nn.ModuleList):
    """Modules under a host's names that cannot run. own: the diffusers model that it stands for."""

    own: nn.Module | None = None


def standing(
    own: nn.Module,
    layers: Mapping[str, tuple[int, int]] | None = None,
    holders: Iterable[str] = (),
    **facts: Any,
) -> StandIn:
    """A stand-in for the host's form of `own`.

    layers: the host's name of a linear -> (rows, columns). holders: names of modules that only
    have to be there. facts: attributes of the model itself.
    """
    root = StandIn()
    for name in holders:
        _inside(root, name)
    for name, (rows, columns) in (layers or {}).items():
        parent, _, key = name.rpartition(".")
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        _inside(root, parent).add_module(key, linear)
    vars(root).update(facts, own=own)
    return root


def _inside(root: nn.Module, name: str) -> nn.Module:
    """The module `name`, made where it is not there yet."""
    for key in filter(None, name.split(".")):
        if key not in root._modules:
            root.add_module(key, StandIn())
        root = root.get_submodule(key)
    return root


def size_of(module: nn.Module, name: str) -> tuple[int, int]:
    """(rows, columns) of the linear called `name`."""
    layer: Any = module.get_submodule(name)
    return layer.out_features, layer.in_features
