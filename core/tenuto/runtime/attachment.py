"""`attach`: an artifact's patches put into a model.

In this order: the temporal table takes out its modules, leaves are replaced, the cache
schedule is applied.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..artifact import Artifact, fingerprint, localized, same, schedule_of, tabled
from ..caching import CachedBranch, apply_schedule_
from ..errors import ArtifactError
from ..model import (
    Attached,
    KeyMap,
    Override,
    Swap,
    denoiser_of,
    encoders_of,
    key_map_of,
    layers,
)
from ..numerics import QTensor, Scheme
from ..sampling import Clock, Follow
from .execution import DENSE, Chooser, check_execution, word
from .kernels.quantize_input import Memo
from .layers import QConv2d, QLayer, QLinear
from .temporal_table import TemporalTable


class Tenuto(Attached):
    """An attached artifact, and what it does while it is on."""

    def __init__(
        self, handle: Any, artifact: Artifact, clock: Clock, total: int, keys: KeyMap | None
    ) -> None:
        super().__init__(handle, [])
        self.artifact, self.clock, self._total, self.keys = artifact, clock, total, keys

    @property
    def denoiser(self) -> nn.Module:
        """The patched denoiser."""
        return denoiser_of(self.handle)

    def encoders(self) -> dict[str, int]:
        """How many layers of each text encoder are quantized: weights alone, inputs in float."""
        found = {
            name: sum(isinstance(m, QLayer) for m in encoder.modules())
            for name, encoder in encoders_of(self.handle).items()
        }
        return {name: count for name, count in found.items() if count}

    def execution(self) -> dict[str, Any]:
        """How the Linear and Conv2d layers compute: {"mode", "layers": {how: count}}.

        Under "auto" also {"choices": {layer: {rows: how}}}, what was decided so far and for how
        many rows at most: `int8` or `dequantized`, which is the float layer with that weight.
        """
        count: Counter[str] = Counter()
        choices: dict[str, dict[str, str]] = {}
        for name, module in self.denoiser.named_modules():
            if isinstance(module, QLayer):
                count[module.execution] += 1
                if module.choices:
                    made = sorted(module.choices.items(), key=lambda row: row[0][0])
                    choices[name] = {str(2**bits - 1): word(kernel) for (bits, _), kernel in made}
        count["float"] = sum(1 for _ in layers(self.denoiser))
        found = {k: v for k, v in count.items() if v}
        quantized = [k for k in found if k != "float"]
        mode = "float" if not quantized else quantized[0] if len(quantized) == 1 else "mixed"
        return {"mode": mode, "layers": found} | ({"choices": choices} if choices else {})

    def int8_weight_share(self) -> float:
        """Share of Linear and Conv2d weights with codes of 8 bits or fewer and 8-bit inputs.

        Of those that the patched model computes with: a module that a temporal table took out is
        counted neither here nor there. A layer that computes in float at some number of rows does
        not count.
        """
        low = (
            math.prod(module.shape)
            for module in self.denoiser.modules()
            if isinstance(module, QLayer)
            and module.scheme.activation is not None
            and DENSE not in module.execution
        )
        return sum(low) / max(1, self._total)

    def counts(self) -> dict[str, list[int]]:
        """[computed, reused] calls of every branch, by canonical name, since it was attached."""
        keys = self.keys
        named = {m: keys.canonical(n) if keys else n for n, m in self.denoiser.named_modules()}
        patches = [p for p in self.patches if isinstance(p, Override)]
        calls = [(named[p.module], p.call) for p in patches]
        return {name: list(call.counts) for name, call in calls if isinstance(call, CachedBranch)}


def attach(
    model: Any,
    artifact: Artifact | str | Path,
    *,
    execution: str = "auto",
    simulate: bool = False,
    route: bool = True,
    chooser: Chooser | None = None,
) -> Tenuto:
    """Put `artifact` into a diffusers pipeline or a denoiser; use it in a `with`, or `detach()`.

    artifact: what calibration made, or the file of it.
    A denoiser of another code (ldm, ComfyUI) gets it too, by the key map of its family.
    execution: "int8" executes in low precision what the kernels support and simulates the rest: the
    artifact's own arithmetic. "float" computes with the dequantized weights in the model's dtype,
    inputs as they are. "auto" times both when a layer is first called for about so many rows, once
    for layers that are alike in the whole process, and leaves int8 only where it is clearly slower;
    calls of very different sizes may then differ by an input's rounding. simulate: compute
    quantized layers in float, with the same codes. route: apply the cache schedule too. chooser:
    what decides under "auto" in place of the process's own. The text encoders of a pipeline get
    what the artifact has of them; a bare denoiser has none.
    Raises ArtifactError before anything is changed if the artifact is for another model.
    """
    check_execution(execution)
    denoiser, made = denoiser_of(model), Artifact.of(artifact)
    artifact, keys = localized(made, model), key_map_of(denoiser)
    clock = Clock(artifact.header["schedule"]["timesteps"])
    tables = _tables(denoiser, artifact, clock)
    leaves = _leaves(
        denoiser, artifact, clock, simulate=simulate, wanted=execution, chooser=chooser
    )
    encoders = {
        name: (encoder, encoder_layers(encoder, artifact, name))
        for name, encoder in encoders_of(model).items()
    }
    schedule = schedule_of(artifact) if route else None
    missing = set(schedule.branches if schedule else ()) - {n for n, _ in denoiser.named_modules()}
    if missing:
        raise ArtifactError(f"The model has no branch {min(missing)}, which the route names.")
    attached = Tenuto(model, made, clock, _total(denoiser, tables), keys)
    try:
        attached.patches.append(Follow(model, clock, streams=schedule is not None))
        for name, new in (*tables.items(), *leaves.items()):
            attached.patches.append(Swap(denoiser, name, new))
        for encoder, replaced in encoders.values():
            attached.patches += [Swap(encoder, *pair) for pair in replaced.items()]
        if schedule is not None:
            attached.patches += apply_schedule_(denoiser, schedule, clock)
    except BaseException:
        attached.detach()
        raise
    return attached


def quantized(model: nn.Module, artifact: Artifact, **options: Any) -> Tenuto:
    """A deep copy of a denoiser with `artifact` attached; the caller's stays as it is."""
    return attach(copy.deepcopy(denoiser_of(model)), artifact, **options)


def _total(denoiser: nn.Module, tables: dict[str, TemporalTable]) -> int:
    """Linear and Conv2d weights; what lies in a module that a table replaces is not counted."""
    out = tuple(f"{name}." for name in tables)
    return sum(m.weight.numel() for n, m in layers(denoiser) if not f"{n}.".startswith(out))


def _tables(denoiser: nn.Module, artifact: Artifact, clock: Clock) -> dict[str, TemporalTable]:
    """A table for every module that the artifact has the features of; nothing is changed yet."""
    values, by_name = artifact.section("temporal"), dict(denoiser.named_modules())
    found: dict[str, TemporalTable] = {}
    for name, facts in tabled(artifact.header).items():
        if name not in by_name:
            raise ArtifactError(f"The model has no module {name}, which the temporal table names.")
        rows = [values[f"{name}.{number}"] for number in range(len(facts["outputs"]))]
        found[name] = TemporalTable(by_name[name], rows, bool(facts["single"]), clock)
    return found


def _leaves(
    denoiser: nn.Module, artifact: Artifact, clock: Clock, **options: Any
) -> dict[str, QLayer]:
    """A quantized layer for every one that the artifact names; nothing is changed yet."""
    weights, ranges = artifact.section("weights"), artifact.section("ranges")
    return _replaced(denoiser, artifact.header, weights, ranges, clock, options)


def encoder_layers(encoder: nn.Module, artifact: Artifact, name: str) -> dict[str, QLayer]:
    """A layer for every one that the artifact has of the text encoder `name`; none is put in.

    Raises ArtifactError if they are of another encoder.
    """
    facts = artifact.header.get("encoders", {}).get(name)
    if facts is None:
        return {}
    if not same(facts["fingerprint"], fingerprint(encoder)):
        raise ArtifactError(f"The artifact was made for another {name}: the weights differ.")
    start = f"{name}."
    section = artifact.section("encoder").items()
    weights = {key.removeprefix(start): t for key, t in section if key.startswith(start)}
    return _replaced(encoder, facts, weights, {}, Clock((0.0,)), {})


def _replaced(
    model: nn.Module,
    header: dict[str, Any],
    weights: dict[str, Tensor],
    ranges: dict[str, Tensor],
    clock: Clock,
    options: dict[str, Any],
) -> dict[str, QLayer]:
    by_name = dict(layers(model))
    schemes = {k: Scheme.from_json(v) for k, v in header.get("schemes", {}).items()}
    found: dict[str, QLayer] = {}
    memo = Memo()
    for name, facts in header.get("layers", {}).items():
        layer = by_name.get(name)
        if layer is None or tuple(layer.weight.shape) != tuple(facts["shape"]):
            raise ArtifactError(f"The model has no layer {name} of shape {facts['shape']}.")
        scheme = schemes[facts["scheme"]]
        weight = QTensor.from_tensors(weights, name, facts["shape"], scheme.weight)
        static = scheme.activation is not None and not scheme.activation.dynamic
        pair = (ranges[f"{name}.scale"], ranges[f"{name}.zero_point"]) if static else None
        kind: Any = QConv2d if isinstance(layer, nn.Conv2d) else QLinear
        found[name] = kind(layer, weight, scheme, clock, pair, memo=memo, **options)
    return found
