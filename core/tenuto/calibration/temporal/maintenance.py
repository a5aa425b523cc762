"""How the time-only modules are quantized: not apart, reconstructed, as a table, or the better one.

none: like every other layer, by the recipe. tiar: TIAR and FSC of TFMQ-DM (arXiv 2311.16503), all
of them as one block, before any other, against their outputs at every calibrated step; and one
activation range a step. table: the values themselves, fp16, and no module at all. auto: a table;
where one is further off than `ENOUGH`, the one of tiar and table with the smaller mean error
(1 - cosine, over the steps). Reconstruction takes hours where a model's modulations are large.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, SchemeError
from ...model import Backbone, cache_on, frozen, private_copy
from ...numerics import QTensor, Scheme, schemes
from ...progress import Progress
from ...sampling import Trajectory
from ..algorithms.nearest import RoundToNearest
from ..algorithms.tiar import Tiar
from .discovery import discover
from .time_path import TimePath, time_path

log = logging.getLogger("tenuto")

CHOICES = ("none", "tiar", "table", "auto")
ENOUGH = 1e-6  # 1 - cosine: a tenth of what a reconstruction reaches; fp16 has some 1e-8
UNIT = "temporal"  # what the unit of work is called, and what the artifact's section is


def check_choice(name: str) -> str:
    """`name` itself; SchemeError names the choices."""
    if name not in CHOICES:
        raise SchemeError(f"Unknown temporal choice {name!r}: one of {', '.join(CHOICES)}.")
    return name


def with_time_only(denoiser: nn.Module, backbone: Backbone, trajectory: Trajectory) -> Backbone:
    """`backbone` with its time-only modules discovered where no family knows the model."""
    if backbone.family != "generic" or backbone.temporal:
        return backbone
    try:
        plain = private_copy(denoiser) if cache_on(denoiser) else denoiser
        found = discover(plain, trajectory.calls[0])
    except (ModelError, RuntimeError, LookupError, TypeError, ValueError) as error:
        log.warning("Time-only modules could not be discovered: %s", error)
        return backbone
    return replace(backbone, temporal=found)


def per_step(scheme: Scheme) -> Scheme:
    """`scheme` with one activation range a step (FSC): the inputs are a finite set."""
    if scheme.activation is None or scheme.activation.per_step:
        return scheme
    static = schemes.W8A8_STATIC.activation
    if scheme.activation.dtype != "int":
        static = replace(scheme.activation, granularity="tensor", per_step=True)
    return Scheme(f"{scheme.name.removesuffix('-static')}-static", scheme.weight, static)


@dataclass
class Maintenance:
    """The time path of one quantization and what becomes of it.

    path: the time-only modules with layers that the recipe quantizes. schemes: of those layers.
    """

    choice: str
    rounding: Tiar
    path: TimePath
    schemes: dict[str, Scheme]

    @staticmethod
    def of(
        model: nn.Module,
        names: tuple[str, ...],
        plan: Mapping[str, Scheme],
        trajectory: Trajectory,
        device: Any,
        choice: str,
        rounding: Tiar,
    ) -> Maintenance:
        """Of the modules `names` those that hold a layer of `plan`; the model is still float."""
        fixed = [layer for layer, scheme in plan.items() if scheme.of_files]  # they stay so
        wanted = [n for n in names if any(_inside(layer, n) for layer in plan)]
        wanted = [n for n in wanted if not any(_inside(layer, n) for layer in fixed)]
        try:
            with frozen(model):
                path = time_path(model, wanted, trajectory, device)
        except ModelError as error:
            log.warning("Time-only modules are not maintained: %s", error)
            path = time_path(model, (), trajectory, device)
        layers = {n: s for n, s in plan.items() if any(_inside(n, m) for m in path.names)}
        return Maintenance(choice, rounding, path, layers)

    def layers(self) -> list[str]:
        """The layers that are a unit of their own: none where the choice is none."""
        return [] if self.choice == "none" else list(self.schemes)

    def quantized(self, seed: int, note: Progress) -> dict[str, Tensor]:
        """The tensors of the unit: weights and ranges by layer, tables and errors by module."""
        tables = {n: tuple(map(_half, self.path.features[n])) for n in self.path.names}
        weights: dict[str, QTensor] = {}
        ranges: dict[str, tuple[Tensor, Tensor]] = {}
        tried: dict[str, dict[str, Tensor]] = {}
        wanted = set(self.path.names)
        if self.choice in ("table", "auto"):
            tried["table"] = self._errors({}, {}, tables)
            wanted = {n for n in wanted if self.choice == "auto" and _far(tried["table"][n])}
        if wanted:
            weights = self._reconstructed(wanted, seed, note)
            forms = {n: per_step(self.schemes[n]).activation for n in weights}
            ranges = self.path.ranges(weights, {n: form for n, form in forms.items() if form})
            errors = self._errors(weights, ranges, {})
            tried["tiar"] = {n: e for n, e in errors.items() if n in wanted}
        kinds = {n: _better({k: e[n] for k, e in tried.items() if n in e}) for n in self.path.names}
        tables = {n: rows for n, rows in tables.items() if kinds[n] == "table"}
        weights = {n: q for n, q in weights.items() if kinds[self.path.owner(n)] == "tiar"}
        ranges = {n: pair for n, pair in ranges.items() if n in weights}
        mixed = len(set(kinds.values())) > 1
        errors = (
            self._errors(weights, ranges, tables) if mixed else tried[next(iter(kinds.values()))]
        )
        found = {f"error/{n}": e for n, e in errors.items()}
        found |= {f"tried/{k}/{n}": e for k, es in tried.items() for n, e in es.items()}
        for name, q in weights.items():
            found |= q.tensors(name)
        for name, (scale, zero) in ranges.items():
            found |= {f"ranges/{name}.scale": scale, f"ranges/{name}.zero_point": zero}
        for name, rows in tables.items():
            found |= {f"table/{name}.{number}": t for number, t in enumerate(rows)}
        return found

    def plain(
        self, weights: Mapping[str, QTensor], ranges: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """The errors of the choice none, in the form that `quantized` returns."""
        own = {n: weights[n] for n in self.schemes}
        found = self.path.errors({n: (q, self.schemes[n]) for n, q in own.items()}, ranges, {})
        return {f"error/{n}": e for n, e in found.items()}

    def header(self, kept: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the artifact's header says of it; kept: what `quantized` or `plain` returned."""
        modules = {}
        for name in self.path.names:
            table = f"table/{name}.0" in kept
            kind = "none" if self.choice == "none" else "table" if table else "tiar"
            facts: dict[str, Any] = {"kind": kind} | _summary(kept[f"error/{name}"])
            tried = {k: kept.get(f"tried/{k}/{name}") for k in ("tiar", "table")}
            if self.choice == "auto":
                means = {k: _short(float(e.mean())) for k, e in tried.items() if e is not None}
                facts["considered"] = means
            if table:
                facts["single"] = self.path.singles[name]
                facts["outputs"] = [list(t.shape[1:]) for t in self.path.features[name]]
            modules[name] = facts
        rounding = {"name": "Tiar", **asdict(self.rounding)}
        made = any(key.startswith("tried/tiar/") for key in kept)
        learnt = {"rounding": rounding} if made else {}
        return {"choice": self.choice, "modules": modules} | learnt

    def _reconstructed(
        self, wanted: Collection[str], seed: int, note: Progress
    ) -> dict[str, QTensor]:
        """TIAR of the modules `wanted`, of their layers below 8 bits; others round to nearest."""
        path, bank, target = self.path, self.path.bank, self.path.target()
        found: dict[str, QTensor] = {}
        some = {n: s for n, s in self.schemes.items() if path.owner(n) in wanted}
        local = {path.local(n): (n, s) for n, s in some.items()}
        wide = {k: s for k, (_, s) in local.items() if s.weight.bits >= 8}
        narrow = {k: s for k, (_, s) in local.items() if s.weight.bits < 8}
        if wide:
            found |= RoundToNearest()(path, wide)
        if narrow:
            options: dict[str, Any] = {"seed": seed, "on_progress": note}
            found |= self.rounding(path, narrow, bank, target, **options)
        return {local[k][0]: q for k, q in found.items()}

    def _errors(
        self,
        weights: Mapping[str, QTensor],
        ranges: Mapping[str, tuple[Tensor, Tensor]],
        tables: Mapping[str, tuple[Tensor, ...]],
    ) -> dict[str, Tensor]:
        static = {n: (q, per_step(self.schemes[n])) for n, q in weights.items()}
        return self.path.errors(static, ranges, tables)


def _inside(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(f"{module}.")


def _half(values: Tensor) -> Tensor:
    """fp16, or the values as they are where that has no room for them."""
    half = values.to(torch.float16)
    return half if bool(half.isfinite().all()) else values


def _far(error: Tensor) -> bool:
    """Whether a table is so far off that it is worth while to reconstruct its module too."""
    return not float(error.max()) <= ENOUGH


def _better(errors: Mapping[str, Tensor]) -> str:
    """The kind with the smallest mean error; the table where both are equal."""
    return min(errors, key=lambda kind: (float(errors[kind].mean()), kind != "table"))


def _summary(error: Tensor) -> dict[str, Any]:
    return {
        "cosine_error": [_short(float(e)) for e in error],
        "mean": _short(float(error.mean())),
        "worst": _short(float(error.max())),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
