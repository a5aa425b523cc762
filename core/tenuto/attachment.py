"""`attach`: an artifact's patches put into a model, in this order: leaves, then the route."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

from torch import nn

from .artifact import Artifact
from .backbone import layers
from .caching.schedule import CacheSchedule, Hold, lay_
from .clock import Clock
from .errors import ArtifactError
from .kernels.activation import Memo
from .patching import Attached, Follow, Override, Swap, denoiser_of
from .qtensor import QConv2d, QLayer, QLinear, QTensor
from .scheme import Scheme


class Tenuto(Attached):
    """An attached artifact, and what it does while it is on."""

    def __init__(self, handle: Any, artifact: Artifact, clock: Clock, share: float) -> None:
        super().__init__(handle, [])
        self.artifact, self.clock, self._share = artifact, clock, share

    @property
    def denoiser(self) -> nn.Module:
        """The patched denoiser."""
        return denoiser_of(self.handle)

    def execution(self) -> dict[str, Any]:
        """How the Linear and Conv2d layers compute: {"mode", "layers": {how: count}}."""
        count: Counter[str] = Counter()
        for module in self.denoiser.modules():
            if isinstance(module, QLayer):
                count[module.execution] += 1
        count["float"] = sum(1 for _ in layers(self.denoiser))
        found = {k: v for k, v in count.items() if v}
        quantized = [k for k in found if k != "float"]
        mode = "float" if not quantized else quantized[0] if len(quantized) == 1 else "mixed"
        return {"mode": mode, "layers": found}

    def int8_weight_share(self) -> float:
        """Share of Linear and Conv2d weights with codes of 8 bits or fewer and 8-bit inputs."""
        return self._share

    def counts(self) -> dict[str, list[int]]:
        """[computed, held] calls of every branch since the artifact was attached."""
        names = {m: n for n, m in self.denoiser.named_modules()}
        patches = [p for p in self.patches if isinstance(p, Override)]
        calls = [(names[p.module], p.call) for p in patches]
        return {name: list(call.counts) for name, call in calls if isinstance(call, Hold)}


def attach(model: Any, artifact: Artifact, *, simulate: bool = False, route: bool = True) -> Tenuto:
    """Put `artifact` into a diffusers pipeline or a denoiser; use it in a `with`, or `detach()`.

    simulate: compute quantized layers in float (same codes). route: lay the cache schedule too.
    Raises ArtifactError before anything is changed if the artifact is for another model.
    """
    artifact.validate()
    artifact.check(model)
    denoiser = denoiser_of(model)
    clock = Clock(artifact.header["schedule"]["timesteps"])
    leaves = _leaves(denoiser, artifact, clock, simulate)
    schedule = schedule_of(artifact) if route else None
    missing = set(schedule.branches if schedule else ()) - {n for n, _ in denoiser.named_modules()}
    if missing:
        raise ArtifactError(f"The model has no branch {min(missing)}, which the route names.")
    share = _share(denoiser, leaves)
    attached = Tenuto(model, artifact, clock, share)
    try:
        attached.patches.append(Follow(denoiser, clock, streams=schedule is not None))
        for name, leaf in leaves.items():
            attached.patches.append(Swap(denoiser, name, leaf))
        if schedule is not None:
            attached.patches += lay_(denoiser, schedule, clock)
    except BaseException:
        attached.detach()
        raise
    return attached


def quantized(model: nn.Module, artifact: Artifact, **options: Any) -> Tenuto:
    """A deep copy of a denoiser with `artifact` attached; the caller's stays as it is."""
    return attach(copy.deepcopy(denoiser_of(model)), artifact, **options)


def schedule_of(artifact: Artifact) -> CacheSchedule | None:
    """The cache schedule in the artifact's route, or None."""
    facts = artifact.header.get("route")
    table = artifact.tensors.get("route/table")
    if facts is None or table is None:
        return None
    try:
        times, branches = tuple(float(t) for t in facts["timesteps"]), tuple(facts["branches"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError("The artifact is damaged: its route has no steps.") from error
    return CacheSchedule(table.bool(), times, branches)


def _share(denoiser: nn.Module, leaves: dict[str, QLayer]) -> float:
    """Share of Linear and Conv2d weights whose layer computes on 8-bit codes on both sides."""
    total = sum(m.weight.numel() for _, m in layers(denoiser))
    low = sum(math.prod(q.shape) for q in leaves.values() if q.scheme.activation is not None)
    return low / max(1, total)


def _leaves(
    denoiser: nn.Module, artifact: Artifact, clock: Clock, simulate: bool
) -> dict[str, QLayer]:
    """A quantized layer for every one that the artifact names; nothing is changed yet."""
    weights, ranges = artifact.section("weights"), artifact.section("ranges")
    by_name = dict(layers(denoiser))
    schemes = {k: Scheme.from_json(v) for k, v in artifact.header.get("schemes", {}).items()}
    found: dict[str, QLayer] = {}
    memo = Memo()
    for name, facts in artifact.header.get("layers", {}).items():
        layer = by_name.get(name)
        if layer is None or tuple(layer.weight.shape) != tuple(facts["shape"]):
            raise ArtifactError(f"The model has no layer {name} of shape {facts['shape']}.")
        scheme = schemes[facts["scheme"]]
        weight = QTensor.from_tensors(weights, name, facts["shape"], scheme.weight.bits)
        static = scheme.activation is not None and not scheme.activation.dynamic
        pair = (ranges[f"{name}.scale"], ranges[f"{name}.zero_point"]) if static else None
        kind: Any = QConv2d if isinstance(layer, nn.Conv2d) else QLinear
        found[name] = kind(layer, weight, scheme, clock, pair, simulate, memo)
    return found
