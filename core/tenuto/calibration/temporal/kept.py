"""What the unit of the time path keeps in the work, and what the artifact's header says of it.

Its tensors: `error/MODULE` float64 (T,), 1 - cosine; those of layers and `ranges/LAYER.*` where it
was reconstructed; `table/MODULE.I` and what is beside it; of the choice auto `tried/KIND/MODULE`,
errors of each kind; of select `chosen/MODULE` and `option/KIND/MODULE`, float64 (2,): bytes and
effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...numerics import Curves, QTensor, Scheme, schemes
from .selection import Option

if TYPE_CHECKING:
    from .maintenance import Maintenance

Tables = Mapping[str, tuple[Tensor | Curves, ...]]


def per_step(scheme: Scheme) -> Scheme:
    """`scheme` with one activation range a step (FSC): the inputs are a finite set."""
    if scheme.activation is None or scheme.activation.per_step:
        return scheme
    static = schemes.W8A8_STATIC.activation
    if scheme.activation.dtype != "int":
        static = replace(scheme.activation, granularity="tensor", per_step=True)
    return Scheme(f"{scheme.name.removesuffix('-static')}-static", scheme.weight, static)


def unit_tensors(
    errors: Mapping[str, Tensor],
    weights: Mapping[str, QTensor],
    ranges: Mapping[str, tuple[Tensor, Tensor]],
    tables: Tables,
) -> dict[str, Tensor]:
    """What the unit keeps, under its names."""
    found = {f"error/{n}": e for n, e in errors.items()}
    for name, q in weights.items():
        found |= q.tensors(name)
    for name, (scale, zero) in ranges.items():
        found |= {f"ranges/{name}.scale": scale, f"ranges/{name}.zero_point": zero}
    for name, some in tables.items():
        for key, t in ((f"table/{name}.{number}", t) for number, t in enumerate(some)):
            found |= t.tensors(key) if isinstance(t, Curves) else {key: t}
    return found


def pair(option: Option) -> Tensor:
    """The bytes and the effect of an option, float64 (2,)."""
    return torch.tensor([option.nbytes, option.effect], dtype=torch.float64)


def _option(kept: Tensor) -> dict[str, Any]:
    """What the header says of an option."""
    return {"bytes": int(kept[0]), "effect": _short(float(kept[1]))}


def described(time: Maintenance, kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the artifact's header says of it; kept: what `quantized` or `plain` returned."""
    modules = {}
    for name in time.path.names:
        kind = _kind(time, name, kept)
        facts: dict[str, Any] = {"kind": kind} | _summary(kept[f"error/{name}"])
        tried = {k: kept.get(f"tried/{k}/{name}") for k in ("tiar", "table")}
        if time.choice == "auto":
            means = {k: _short(float(e.mean())) for k, e in tried.items() if e is not None}
            facts["considered"] = means
        if f"chosen/{name}" in kept:
            facts |= _option(kept[f"chosen/{name}"])
            ways = {k: kept.get(f"option/{k}/{name}") for k in ("tiar", "table", "float")}
            facts["considered"] = {k: _option(o) for k, o in ways.items() if o is not None}
        if kind == "table":
            facts |= _shapes(time, name, kept)
        modules[name] = facts
    rounding = {"name": "Tiar", **asdict(time.rounding)}
    made = any(key.startswith(("tried/tiar/", "option/tiar/")) for key in kept)
    learnt: dict[str, Any] = {"rounding": rounding} if made else {}
    if time.choice == "select":
        learnt["budget"] = time.budget
    return {"choice": time.choice, "modules": modules} | learnt


def _kind(time: Maintenance, name: str, kept: Mapping[str, Tensor]) -> str:
    """What became of a module."""
    if time.choice == "none":
        return "none"
    if f"table/{name}.0" in kept:
        return "table"
    own = (n for n in time.schemes if time.path.owner(n) == name)
    return "tiar" if any(f"{n}.qdata" in kept for n in own) else "float"


def _shapes(time: Maintenance, name: str, kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the header says of a table: the shapes of its outputs, and curves where it has."""
    features = time.path.features[name]
    tables = [kept[f"table/{name}.{i}"] for i in range(len(features))]
    counts = [len(t) if t.dtype is torch.int8 else 0 for t in tables]
    shapes = {"outputs": [list(t.shape[1:]) for t in features]}
    found = {"single": time.path.singles[name]} | shapes
    return found | ({"curves": counts} if any(counts) else {})


def _summary(error: Tensor) -> dict[str, Any]:
    return {
        "cosine_error": [_short(float(e)) for e in error],
        "mean": _short(float(error.mean())),
        "worst": _short(float(error.max())),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
