"""`attach`: an artifact's patches put into a model.

In this order: the temporal table takes out its modules, layers are replaced, the cache schedule is
applied.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..artifact import Artifact, fingerprint, same
from ..caching import CachedBranch, CacheSchedule, ForecastCalls, apply_schedule_
from ..errors import ArtifactError, ModelError
from ..model import (
    Attached,
    Describe,
    KeyMap,
    Override,
    Replacement,
    Swap,
    adapted,
    check_fused,
    check_weights,
    denoiser_of,
    describe,
    describing,
    encoders_of,
    key_map_of,
    layers,
    override_,
    own_modules,
    private_copy,
    refuse_cache,
)
from ..numerics import Scheme, known
from ..sampling import Clock, Follow
from .execution import DENSE, Chooser, word
from .layers import QLayer
from .replacements import Patches, Policy, Replacements, replacements_for, schemes_in


class Tenuto(Attached):
    """An attached artifact (None: a scheme), and what it does while it is on."""

    def __init__(
        self,
        handle: Any,
        artifact: Artifact | None,
        clock: Clock,
        total: int,
        keys: KeyMap | None,
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
        """[computed, reused] calls of every branch, by canonical name, since it was attached.

        Under a forecast: [computed, forecast] calls of the denoiser, "".
        """
        keys = self.keys
        named = {m: keys.canonical(n) if keys else n for n, m in self.denoiser.named_modules()}
        patches = [p for p in self.patches if isinstance(p, Override)]
        calls = [(named[p.module], p.call) for p in patches]
        counted = (CachedBranch, ForecastCalls)
        return {name: list(call.counts) for name, call in calls if isinstance(call, counted)}


def attach(
    model: Any,
    artifact: Artifact | Scheme | str | Path,
    *,
    execution: str = "auto",
    simulate: bool = False,
    route: bool = True,
    speedup: float | None = None,
    chooser: Chooser | None = None,
    describe: Describe | None = None,
) -> Tenuto:
    """Put `artifact` into a diffusers pipeline or a denoiser; use it in a `with`, or `detach()`.

    artifact: what calibration made, or the file of it. A scheme instead, or its name, rounds every
    layer to nearest where it is, without calibration. A denoiser of another code (ldm, ComfyUI)
    gets it too, by the key map of its family.
    execution: "int8" executes in low precision what the kernels support and simulates the rest: the
    artifact's own arithmetic. "float" computes with the dequantized weights in the model's dtype,
    inputs as they are. "auto" times both when a layer is first called for about so many rows, once
    for layers that are alike in the whole process, and leaves int8 only where it is clearly slower;
    calls of very different sizes may then differ by an input's rounding. simulate: compute
    quantized layers in float, with the same codes. route: apply the cache schedule too. speedup:
    in place of the schedule, skip whole denoiser calls, so that a run has so many times fewer, and
    forecast their outputs: 2.0 skips half; in runs of fewer than nine steps, or where the sampler
    adds noise of its own, none. chooser: what decides under "auto" in place of the process's own.
    The text encoders of a pipeline get what the artifact has of them; a bare denoiser has none.
    describe: what a model without a family file is made of, as for `quantize`; once is enough.
    Raises ArtifactError before anything is changed if the artifact is for another model.
    """
    describing(model, describe)
    if isinstance(artifact, str):
        artifact = known().get(artifact, artifact)
    if isinstance(artifact, Scheme):
        patches = Patches(scheme=artifact, execution=execution, simulate=simulate, speedup=speedup)
    else:
        made = Artifact.of(artifact)
        patches = Patches(
            made, route=route, execution=execution, simulate=simulate, speedup=speedup
        )
    return install(model, patches, chooser)


def install(model: Any, patches: Patches, chooser: Chooser | None = None) -> Tenuto:
    """`attach`, by what is to be put in."""
    denoiser, made = denoiser_of(model), patches.artifact
    check_free(denoiser)
    plan = replacements_for(denoiser, patches, chooser=chooser)
    if plan:
        check_fused(denoiser)
    if plan.policy is not None or plan.forecast is not None:
        refuse_cache(denoiser, "a cache schedule")
    modules = dict(own_modules(denoiser))
    new: dict[str, nn.Module] = {
        name: plan.table(name, modules[name])
        for name in plan.tables
        if not adapted(modules[name])  # a table knows nothing of a LoRA
    }
    new |= {name: plan.layer(name, modules[name]) for name in plan.schemes}
    encoders = {
        name: (encoder, encoder_layers(encoder, made, name))
        for name, encoder in encoders_of(model).items()
        if made is not None
    }
    attached = Tenuto(model, made, plan.clock, _total(denoiser, plan.tables), key_map_of(denoiser))
    times = plan.clock.timesteps
    if plan.policy is not None and not times:
        raise ArtifactError("A cache policy needs the timesteps of an artifact.")
    try:
        if times:
            streams = plan.policy is not None or plan.forecast is not None
            attached.patches.append(Follow(model, plan.clock, streams=streams))
        attached.patches += [Swap(denoiser, *pair) for pair in new.items()]
        for encoder, replaced in encoders.values():
            attached.patches += [Swap(encoder, *pair) for pair in replaced.items()]
        if plan.policy is not None:
            schedule = _schedule(denoiser, plan.policy, times)
            attached.patches += apply_schedule_(denoiser, schedule, plan.clock)
        if plan.forecast is not None:
            calls = ForecastCalls(plan.clock, plan.forecast, denoiser)
            attached.patches.append(override_(denoiser, calls))
    except BaseException:
        attached.detach()
        raise
    return attached


def check_free(denoiser: nn.Module) -> None:
    """ModelError if layers are replaced already, or if weights are elsewhere until called."""
    if any(isinstance(module, Replacement) for module in denoiser.modules()):
        raise ModelError("An artifact is attached to the model already: detach() it first.")
    check_weights(denoiser)


def quantized(model: nn.Module, artifact: Artifact, **options: Any) -> Tenuto:
    """A deep copy of a denoiser with `artifact` attached; the caller's stays as it is."""
    return attach(private_copy(denoiser_of(model)), artifact, **options)


def _schedule(denoiser: nn.Module, policy: Policy, times: tuple[float, ...]) -> CacheSchedule:
    """What a policy makes for the calibrated steps; each run has its own table of it."""
    if isinstance(policy, CacheSchedule):
        return policy
    return policy(times, tuple(branch.name for branch in describe(denoiser).branches))


def _total(denoiser: nn.Module, tables: Iterable[str]) -> int:
    """Linear and Conv2d weights; what lies in a module that a table replaces is not counted."""
    out = tuple(f"{name}." for name in tables)
    return sum(m.weight.numel() for n, m in layers(denoiser) if not f"{n}.".startswith(out))


def encoder_layers(encoder: nn.Module, artifact: Artifact, name: str) -> dict[str, QLayer]:
    """A layer for every one that the artifact has of the text encoder `name`; none is put in.

    Raises ArtifactError if they are of another encoder.
    """
    facts = artifact.header.get("encoders", {}).get(name)
    if facts is None:
        return {}
    check_weights(encoder)
    if not same(facts["fingerprint"], fingerprint(encoder)):
        raise ArtifactError(f"The artifact was made for another {name}: the weights differ.")
    start, modules = f"{name}.", dict(layers(encoder))
    section = artifact.section("encoder").items()
    codes = {key.removeprefix(start): t for key, t in section if key.startswith(start)}
    plan = Replacements(schemes_in(facts, modules), codes, clock=Clock((0.0,)))
    return {layer: plan.layer(layer, modules[layer]) for layer in plan.schemes}
