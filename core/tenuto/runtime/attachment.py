"""`attach`: an artifact's patches put into a model.

In this order: the temporal table takes out its modules, layers are replaced, the cache schedule is
applied.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..artifact import Artifact, fingerprint, same
from ..caching import AUTO, DEFAULT_FORECAST, ForecastCalls, Speedup, apply_policy_
from ..errors import ArtifactError, ModelError
from ..model import (
    Describe,
    Parked,
    Replacement,
    Swap,
    adapted,
    check_fused,
    check_originals,
    check_weights,
    denoiser_of,
    describe,
    describing,
    encoders_of,
    key_map_of,
    layers,
    override_,
    own_modules,
    parts_of,
    private_copy,
    refuse_cache,
)
from ..numerics import Scheme, known
from ..sampling import Clock, Follow
from .attached import Part, Tenuto
from .captures import Reads
from .default_forecast import default_kernel_of, with_default
from .denoiser_call import Calls
from .execution import Chooser, chooser_for
from .layers import QLayer
from .mode import Mode
from .prompt_modules import once_
from .replacements import Patches, Policy, Replacements, replacements_for, schemes_in

log = logging.getLogger("tenuto")


def attach(
    model: Any,
    artifact: Artifact | Scheme | str | Path | None = None,
    *,
    execution: str = "auto",
    simulate: bool = False,
    route: bool = True,
    policy: Policy | None = None,
    speedup: Speedup | None = None,
    chooser: Chooser | None = None,
    compile: bool = False,
    graphs: bool | str = "auto",
    originals: str = "keep",
    once: bool = False,
    describe: Describe | None = None,
) -> Tenuto:
    """Put `artifact` into a diffusers pipeline or a denoiser; use it in a `with`, or `detach()`.

    artifact: what calibration made, or the file of it. A scheme instead, or its name, rounds every
    layer to nearest where it is. A denoiser of another code (ldm, ComfyUI) gets it too. None or
    "forecast-default" changes no layer: calls are skipped by a kernel that ships.
    execution: "int8" executes in low precision (int8, or fp8 where a scheme says it) what the
    kernels support and simulates the rest: the artifact's own arithmetic. "float" computes with the
    dequantized weights in the model's dtype, inputs as they are. "auto" times both when a layer is
    first called for about so many rows, once for layers that are alike in the whole process, as
    they will run, and leaves low precision only where it is slower, on a CPU clearly slower; calls
    of very different sizes may then differ by an input's rounding. simulate: compute
    quantized layers in float, with the same codes. route: apply the cache schedule too. policy: of
    `tenuto.caching`, in place of the artifact's schedule. speedup:
    in place of the schedule, skip whole denoiser calls, so that a run has so many times fewer, and
    forecast their outputs: 2.0 skips half; in runs of fewer than nine steps, or where the sampler
    adds noise of its own, none. "auto" skips as many as are predicted to do no harm that one sees,
    1 none; None: as the artifact says. Where no artifact has a forecast of the model, the shipped
    one serves, with a warning. chooser: what decides under "auto" in place of the process's own.
    compile: the denoiser's blocks by torch.compile, after its first call. graphs: its calls as CUDA
    graphs, one for every pattern of a step; "auto": where that is faster and there is the memory.
    originals: where float weights are while they are replaced: "keep": where they were; "cpu": in
    main memory; "disk": in a file of the temporary folder (`TMPDIR`). `detach` brings them back.
    once: what is of the prompt alone, as keys and values of cross-attention, is computed once.
    The text encoders and further denoisers of a pipeline get what the artifact has of them; a bare
    denoiser gets what is of its weights. describe: what a model without a family file is made of.
    Raises ArtifactError before anything is changed if the artifact is for another model.
    """
    describing(model, describe)
    check_originals(originals)
    how = Calls.asked(compile, graphs)
    if artifact is None or artifact == DEFAULT_FORECAST:
        patches = _without_artifact(model, artifact is None, speedup, once)
        return install(model, patches, chooser, how, originals, once)
    if isinstance(artifact, str):
        artifact = known().get(artifact, artifact)
    if isinstance(artifact, Scheme):
        patches = Patches(scheme=artifact)
    else:
        patches = Patches(Artifact.of(artifact), route=route, policy=policy)
    patches = replace(patches, execution=execution, simulate=simulate, speedup=speedup)
    return install(model, patches, chooser, how, originals, once)


def _without_artifact(model: Any, alone: bool, speedup: Speedup | None, once: bool) -> Patches:
    """What is put in where no artifact is. alone: nor a kernel that ships is asked for."""
    if alone and speedup is None:
        if once:
            return Patches()
        raise ArtifactError("Say what to attach: an artifact, a scheme or a speedup.")
    speedup = AUTO if speedup is None else speedup
    return Patches(speedup=speedup, kernel=default_kernel_of(model))


def install(
    model: Any,
    patches: Patches,
    chooser: Chooser | None = None,
    how: Calls | None = None,
    originals: str = "keep",
    once: bool = False,
) -> Tenuto:
    """`attach`, by what is to be put in."""
    patches, how = with_default(model, patches), how or Calls()
    chooser = chooser or chooser_for(Mode(how.compile, how.graphs))
    made, denoisers = patches.artifact, parts_of(model)
    for denoiser in denoisers.values():
        check_free(denoiser)
    own = None if made is None else made.by_denoiser(model)
    if made is not None and len(denoisers) > 1:
        made.check(model)  # it says which of them is another
    found: dict[str, Part] = {}
    for name, denoiser in denoisers.items():
        given = patches if own is None else replace(patches, artifact=own.get(name))
        if own is None or name in own or patches.kernel is not None:
            found[name] = _part(denoiser, given, chooser)
        elif len(own[""].tensors) > len(own[""].section("encoder")):
            log.warning("%s stays as it is: the artifact has nothing of it.", name)
    encoders = {
        name: (encoder, encoder_layers(encoder, made, name))
        for name, encoder in encoders_of(model).items()
        if made is not None
    }
    backbones = {name: describe(part.denoiser) for name, part in found.items() if once}
    attached = Tenuto(model, made, found)
    try:
        for patch in (p for name, part in found.items() for p in _put_in(model, name, part)):
            attached.patches.append(patch)
        for encoder, replaced in encoders.values():
            attached.patches += [Swap(encoder, *pair) for pair in replaced.items()]
        if originals != "keep":
            models = [part.denoiser for part in found.values()]
            models += [encoder for encoder, _ in encoders.values()]
            attached.patches.append(Parked(attached.swaps(), models, originals))
        for name, backbone in backbones.items():
            part = found[name]
            whole = part.plan.policy is None
            attached.patches += once_(part.denoiser, backbone, whole, part.clock)
        for part in found.values():
            call, around = how.of(part.denoiser, part.plan.policy is not None)
            attached.patches += around
            part.clock.reads = Reads() if how.graphs else None
            if part.plan.policy is not None:
                cells = apply_policy_(part.denoiser, part.plan.policy, part.clock)
                attached.patches += cells
                call.prepare([c.call for c in cells if c.module is not part.denoiser])
            if part.plan.forecast is not None:
                calls = ForecastCalls(part.clock, part.plan.forecast, part.denoiser)
                calls.says = True
                attached.patches.append(override_(part.denoiser, calls))
    except BaseException:
        attached.detach()
        raise
    return attached


def _part(denoiser: nn.Module, patches: Patches, chooser: Chooser | None) -> Part:
    """What is to be put into one denoiser; nothing is changed yet."""
    plan = replacements_for(denoiser, patches, chooser=chooser)
    if plan:
        check_fused(denoiser)
    if plan.policy is not None or plan.forecast is not None:
        refuse_cache(denoiser, "a cache schedule")
        if plan.policy is not None and not plan.clock.timesteps:
            raise ArtifactError("A cache policy needs the timesteps of an artifact.")
    modules = dict(own_modules(denoiser))
    new: dict[str, nn.Module] = {
        name: plan.table(name, modules[name])
        for name in plan.tables
        if not adapted(modules[name])  # a table knows nothing of a LoRA
    }
    new |= {name: plan.layer(name, modules[name]) for name in plan.schemes}
    return Part(denoiser, plan, new, key_map_of(denoiser), _total(denoiser, plan.tables))


def _put_in(model: Any, name: str, part: Part) -> Iterator[Any]:
    """What follows the denoiser of a part, and what takes the place of its modules."""
    if part.clock.timesteps or part.plan.forecast is not None:
        streams = part.plan.policy is not None or part.plan.forecast is not None
        yield Follow(model, part.clock, streams=streams, part=name)
    for pair in part.new.items():
        yield Swap(part.denoiser, *pair)


def check_free(denoiser: nn.Module, hooked: bool = False) -> None:
    """ModelError if layers are replaced already, or if weights are elsewhere until called.

    hooked: as in `check_weights`.
    """
    if any(isinstance(module, Replacement) for module in denoiser.modules()):
        raise ModelError("An artifact is attached to the model already: detach() it first.")
    check_weights(denoiser, hooked=hooked)


def quantized(model: nn.Module, artifact: Artifact, **options: Any) -> Tenuto:
    """A deep copy of a denoiser with `artifact` attached; the caller's stays as it is."""
    return attach(private_copy(denoiser_of(model)), artifact, **options)


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
