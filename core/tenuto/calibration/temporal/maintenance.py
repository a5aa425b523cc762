"""How the time-only modules are quantized: not apart, reconstructed, as a table, or the better one.

none: like every other layer, by the recipe. tiar: TIAR and FSC of TFMQ-DM (arXiv 2311.16503), all
of them as one block, before any other, against their outputs at every calibrated step; and one
activation range a step. table: the values themselves, fp16, and no module at all. int8: the same
in half the bytes, as sums of curves. select: each module in one of these ways, or left in float,
within a budget of bytes; see `selection.py`. auto: a table; where one is further off than
`ENOUGH`, the one of tiar and table with the smaller mean error (1 - cosine, over the steps).
Reconstruction takes hours where a model's modulations are large.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ...errors import ModelError, SchemeError
from ...model import Backbone, cache_on, frozen, private_copy
from ...numerics import QTensor, Scheme, half
from ...progress import Progress
from ...sampling import Trajectory
from ..algorithms.nearest import RoundToNearest
from ..algorithms.tiar import Tiar
from .discovery import discover
from .disturbance import Worth, worth
from .kept import Tables, described, per_step, unit_tensors
from .select_unit import selected_unit
from .selection import BUDGET, at_half, rows_of
from .time_path import TimePath, time_path

log = logging.getLogger("tenuto")

CHOICES = ("none", "tiar", "table", "int8", "select", "auto")
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


@dataclass
class Maintenance:
    """The time path of one quantization and what becomes of it.

    path: the time-only modules with layers that the recipe quantizes. schemes: of those layers.
    budget: of `select`, a share of what all tables take in fp16. worth: for it, what an error of
    each feature costs, where the modules said may compute; see `disturbance.py`.
    """

    choice: str
    rounding: Tiar
    path: TimePath
    schemes: dict[str, Scheme]
    budget: float = BUDGET
    worth: Callable[[Collection[str], Progress], Worth] | None = None

    @staticmethod
    def of(
        model: nn.Module,
        names: tuple[str, ...],
        plan: Mapping[str, Scheme],
        trajectory: Trajectory,
        device: Any,
        choice: str,
        rounding: Tiar,
        budget: float = BUDGET,
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

        def measured(computing: Collection[str], note: Progress) -> Worth:
            return worth(model, path, trajectory, device, computing, note)

        return Maintenance(choice, rounding, path, layers, budget, measured)

    def layers(self) -> list[str]:
        """The layers that are a unit of their own: none where the choice is none."""
        return [] if self.choice == "none" else list(self.schemes)

    def quantized(self, seed: int, note: Progress) -> dict[str, Tensor]:
        """The tensors of the unit: weights and ranges by layer, tables and errors by module."""
        if self.choice == "select":
            return selected_unit(self, seed, note)
        kept: Any = at_half if self.choice == "int8" else half
        tables: Tables = {n: tuple(map(kept, self.path.features[n])) for n in self.path.names}
        weights: dict[str, QTensor] = {}
        ranges: dict[str, tuple[Tensor, Tensor]] = {}
        tried: dict[str, dict[str, Tensor]] = {}
        wanted = set(self.path.names)
        if self.choice in ("table", "int8", "auto"):
            tried["table"] = self.errors({}, {}, tables)
            wanted = {n for n in wanted if self.choice == "auto" and _far(tried["table"][n])}
        if wanted:
            weights, ranges = self.ranged(wanted, seed, note)
            errors = self.errors(weights, ranges, {})
            tried["tiar"] = {n: e for n, e in errors.items() if n in wanted}
        kinds = {n: _better({k: e[n] for k, e in tried.items() if n in e}) for n in self.path.names}
        tables = {n: rows for n, rows in tables.items() if kinds[n] == "table"}
        weights = {n: q for n, q in weights.items() if kinds[self.path.owner(n)] == "tiar"}
        ranges = {n: pair for n, pair in ranges.items() if n in weights}
        mixed = len(set(kinds.values())) > 1
        errors = (
            self.errors(weights, ranges, tables) if mixed else tried[next(iter(kinds.values()))]
        )
        found = {f"tried/{k}/{n}": e for k, es in tried.items() for n, e in es.items()}
        return found | unit_tensors(errors, weights, ranges, tables)

    def header(self, kept: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the artifact's header says of it; kept: what `quantized` or `plain` returned."""
        return described(self, kept)

    def plain(
        self, weights: Mapping[str, QTensor], ranges: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """The errors of the choice none, in the form that `quantized` returns."""
        own = {n: weights[n] for n in self.schemes}
        found = self.path.errors({n: (q, self.schemes[n]) for n, q in own.items()}, ranges, {})
        return {f"error/{n}": e for n, e in found.items()}

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

    def ranged(
        self, wanted: Collection[str], seed: int, note: Progress
    ) -> tuple[dict[str, QTensor], dict[str, tuple[Tensor, Tensor]]]:
        """TIAR of the modules `wanted`, and one range a step of their layers (FSC)."""
        weights = self._reconstructed(wanted, seed, note)
        forms = {n: per_step(self.schemes[n]).activation for n in weights}
        return weights, self.path.ranges(weights, {n: f for n, f in forms.items() if f})

    def static(self, weights: Mapping[str, QTensor]) -> dict[str, tuple[QTensor, Scheme]]:
        """Each weight with its scheme: one range a step for its inputs."""
        return {n: (q, per_step(self.schemes[n])) for n, q in weights.items()}

    def errors(
        self,
        weights: Mapping[str, QTensor],
        ranges: Mapping[str, tuple[Tensor, Tensor]],
        tables: Tables,
    ) -> dict[str, Tensor]:
        """`TimePath.errors` of what is kept."""
        rows = {n: tuple(map(rows_of, some)) for n, some in tables.items()}
        return self.path.errors(self.static(weights), ranges, rows)


def _inside(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(f"{module}.")


def _far(error: Tensor) -> bool:
    """Whether a table is so far off that it is worth while to reconstruct its module too."""
    return not float(error.max()) <= ENOUGH


def _better(errors: Mapping[str, Tensor]) -> str:
    """The kind with the smallest mean error; the table where both are equal."""
    return min(errors, key=lambda kind: (float(errors[kind].mean()), kind != "table"))
