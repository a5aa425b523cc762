"""Which weights of a denoiser would be quantized, which would not and why, and what is reused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from ...model import Backbone, computes_as_torch, own_modules
from ...numerics import Recipe, Scheme
from ...runtime import quantizable
from ..presets import recipe_for

EXAMPLES = 3  # names of layers that are given for each reason
KNOWN = nn.Linear | nn.Conv2d


class Sorted:
    """The layers of a model by what becomes of them under a scheme or a recipe.

    schemes: {scheme: {"layers", "weights"}}. floats: {why: {"layers", "weights", "names"}}.
    """

    def __init__(self, module: nn.Module, backbone: Backbone, scheme: Scheme | Recipe) -> None:
        recipe = scheme if isinstance(scheme, Recipe) else recipe_for(scheme, backbone)
        self.schemes: dict[str, dict[str, int]] = {}
        self.floats: dict[str, dict[str, Any]] = {}
        for name, layer, size in weighted(module):
            reason = why_float(layer)
            rule = recipe.rule(name) if reason is None else None
            if rule is not None and not quantizable(layer, rule.scheme):
                rule, reason = None, "convolutions have no product of 8-bit floats"
            if rule is not None and rule.scheme is not None:
                facts = self.schemes.setdefault(rule.scheme.name, {"layers": 0, "weights": 0})
            else:
                reason = reason or "kept in full precision: the recipe or the family says so"
                facts = self.floats.setdefault(reason, {"layers": 0, "weights": 0, "names": []})
                facts["names"] += [name][: EXAMPLES - len(facts["names"])]
            facts["layers"] += 1
            facts["weights"] += size

    @property
    def quantized(self) -> int:
        """Weights in layers that would be quantized."""
        return sum(facts["weights"] for facts in self.schemes.values())


def weighted(module: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, module, weights) of all that has weights of more than one dimension itself."""
    for name, child in own_modules(module):
        size = sum(p.numel() for p in child.parameters(recurse=False) if p.ndim > 1)
        if size:
            yield name, child, size


def why_float(layer: nn.Module) -> str | None:
    """Why nothing here can compute `layer` with fewer bits; None: it can."""
    name = type(layer).__name__
    if not isinstance(layer, KNOWN) and next(layer.children(), None) is not None:
        return "parameters that belong to no layer"
    if not isinstance(layer, KNOWN):
        return f"{name} has no number format here"
    if not computes_as_torch(layer):
        return f"{name} computes in a way of its own"
    if not quantizable(layer):
        return "the convolution pads with something else than zeros"
    return None


def parameters(module: nn.Module, names: Iterable[str] | None = None) -> int:
    """Parameters of a module, or of its submodules called `names`, each once."""
    parts = [module] if names is None else [module.get_submodule(name) for name in names]
    found = {id(p): p.numel() for part in parts for p in part.parameters()}
    return sum(found.values())


def weights_of(denoiser: nn.Module, backbone: Backbone) -> dict[str, int]:
    """Numbers of parameters: all, those in branches, those of time-only modules (in no branch)."""
    reused = sorted({branch.name for branch in backbone.branches})
    inside, timed = _ids(denoiser, reused), _ids(denoiser, backbone.temporal)
    sizes = {id(p): p.numel() for p in denoiser.parameters()}
    return {
        "all": sum(sizes.values()),
        "branches": sum(sizes[i] for i in inside - timed),
        "time-only": sum(sizes[i] for i in timed),
    }


def _ids(module: nn.Module, names: Sequence[str]) -> set[int]:
    return {id(p) for name in names for p in module.get_submodule(name).parameters()}
