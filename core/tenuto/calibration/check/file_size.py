"""`file_size`: how large an artifact of a model will be, from shapes alone: also on `meta`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...model import Backbone, describe, layers, map_tensors, tensors_in, watched
from ...numerics import Recipe, Scheme, layout
from ...runtime import quantizable
from ..presets import recipe_for


@dataclass(frozen=True)
class FileSize:
    """Bytes. model: of all weights in 16 bits. codes: of quantized layers, by bits of a weight,
    with scales and zero points. tables: a row a step of every time-only module.

    left: weights in 16 bits that the artifact does not have and the attached model computes with:
    norms, biases, layers that stay in float. weights: how many of the model's are in `codes` (by
    bits), in "tables" and "left".
    """

    model: int
    codes: dict[int, int]
    tables: int
    left: int
    weights: dict[int | str, int]

    @property
    def artifact(self) -> int:
        """Of the file, but for its header and activation ranges."""
        return sum(self.codes.values()) + self.tables

    @property
    def share(self) -> float:
        """Of the artifact, against the model in 16 bits."""
        return self.artifact / self.model


@torch.no_grad()
def file_size(
    denoiser: nn.Module, scheme: Scheme, steps: int, inputs: Mapping[str, Any]
) -> FileSize:
    """What `quantize(..., scheme, temporal="table")` will make of `denoiser`, run at `steps` steps.

    inputs: keywords of one call, on the device of `denoiser`, which makes it: the tables' widths.
    """
    backbone = describe(denoiser)
    codes, weights, modules = codes_of(denoiser, backbone, recipe_for(scheme, backbone))
    tables = steps * _row(denoiser, modules, inputs) * torch.float16.itemsize
    every = sum(p.numel() for p in denoiser.parameters())
    return FileSize(2 * every, codes, tables, 2 * weights["left"], weights)


def size_of(denoiser: nn.Module, backbone: Backbone, wanted: Scheme | Recipe) -> dict[str, int]:
    """Bytes of the denoiser "in 16 bits", and of its "codes" in an artifact: most of the file."""
    recipe = wanted if isinstance(wanted, Recipe) else recipe_for(wanted, backbone)
    codes, *_ = codes_of(denoiser, backbone, recipe)
    whole = 2 * sum(p.numel() for p in denoiser.parameters())
    return {"in 16 bits": whole, "codes": sum(codes.values())}


def codes_of(
    denoiser: nn.Module, backbone: Backbone, recipe: Recipe
) -> tuple[dict[int, int], dict[int | str, int], list[str]]:
    """`codes` and `weights` of a `FileSize`, and the time-only modules that become tables."""
    known, chosen = dict(layers(denoiser)), dict[str, Scheme]()
    for name, layer in known.items():
        rule = recipe.rule(name)
        if rule is not None and rule.scheme is not None and quantizable(layer, rule.scheme):
            chosen[name] = rule.scheme
    modules = [n for n in backbone.temporal if any(f"{c}.".startswith(f"{n}.") for c in chosen)]
    inside = tuple(f"{name}." for name in modules)
    weights: dict[int | str, int] = {"tables": 0, "left": 0}
    codes: dict[int, int] = {}
    for name, parameter in denoiser.named_parameters():
        owner, _, kind = name.rpartition(".")
        if name.startswith(inside):
            weights["tables"] += parameter.numel()
        elif owner in chosen and kind == "weight":
            form = chosen[owner].weight
            parts = layout(owner, tuple(known[owner].weight.shape), form).values()
            size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)
            codes[form.bits] = codes.get(form.bits, 0) + size
            weights[form.bits] = weights.get(form.bits, 0) + parameter.numel()
        else:
            weights["left"] += parameter.numel()
    return codes, weights, modules


def _row(denoiser: nn.Module, modules: list[str], inputs: Mapping[str, Any]) -> int:
    """Numbers in one row of all tables."""
    found: dict[str, int] = {}

    def note(name: str, args: Any, kwargs: Any, out: Any) -> None:
        found.setdefault(name, sum(t[:1].numel() for t in tensors_in(out)))

    device = next(denoiser.parameters()).device

    def there(x: Tensor) -> Tensor:
        return x.to(device)

    with watched(denoiser, modules, after=note):
        denoiser(**map_tensors(there, dict(inputs)))
    return sum(found.values())
