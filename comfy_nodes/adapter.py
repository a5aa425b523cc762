"""ComfyUI as a host: the `Host` protocol on a MODEL (a ModelPatcher)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import nn

from tenuto.artifact import Artifact, localized, schedule_of
from tenuto.caching import CacheSchedule
from tenuto.calibration import recipe_for
from tenuto.errors import ArtifactError, ModelError
from tenuto.model import Attached, KeyMap, describe, families, layers
from tenuto.numerics import Scheme
from tenuto.runtime import Patches, check_execution
from tenuto.sampling import Clock

from .cache import Cache, Policy
from .weights import Weights, unpatched
from .wrapping import Wrapped


class ComfyUI:
    """A MODEL is cloned, and the clone carries the patches; the one that was given stays."""

    def denoiser(self, handle: Any) -> nn.Module:
        """`diffusion_model`."""
        return handle.model.diffusion_model

    def names(self, handle: Any) -> KeyMap | None:
        """By the class of the denoiser."""
        return families.key_map_of(self.denoiser(handle))

    def install(self, handle: Any, patches: Patches) -> Attached:
        """A clone with the artifact in it. `detach` takes the patches out of shared modules."""
        made = here(handle, patches.artifact)
        parts: list[Wrapped] = []
        if made.header.get("layers") or made.header.get("temporal"):
            parts.append(quantized(handle, made, patches.execution, patches.simulate))
        if patches.route and schedule_of(made) is not None:
            parts.append(Cache(handle, routed(made)))
        return Installed(handle, parts)

    @contextmanager
    def follow(self, handle: Any, clock: Clock) -> Iterator[Clock]:
        """By a wrapper on `handle` itself, taken off in the end."""
        watch = Wrapped()
        watch.clock = clock
        handle.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tenuto_follow", watch.calling)
        try:
            yield clock
        finally:
            handle.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, "tenuto_follow")


class Installed(Attached):
    """A patched clone. Without its clone nothing acts; `detach` clears the modules at once."""

    def __init__(self, handle: Any, parts: list[Wrapped]) -> None:
        for part in parts:
            handle = part.apply(handle)
        super().__init__(handle, ())
        self.parts = parts

    def detach(self) -> None:
        """Take the patches out of the modules and off the clone; twice does no harm."""
        for part in self.parts:
            part.eject(self.handle)
            self.handle.remove_injections(part.key)
            for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL):
                self.handle.remove_wrappers_with_key(kind, part.key)
            self.handle.remove_callbacks_with_key(CallbacksMP.ON_DETACH, part.key)
            self.handle.remove_attachments(part.key)


def here(model: Any, artifact: Artifact) -> Artifact:
    """`artifact` in the names of `model`; ArtifactError in one sentence if it is another's."""
    denoiser = model.model.diffusion_model
    found = localized(artifact, denoiser, unpatched(model))
    by_name = dict(denoiser.named_modules())
    schedule = schedule_of(found)
    missing = [n for n in (schedule.branches if schedule else ()) if n not in by_name]
    if missing:
        raise ArtifactError(f"The model has no branch {missing[0]}, which the route names.")
    return found


def quantized(
    model: Any, made: Artifact, execution: str = "int8", simulate: bool = False
) -> Weights:
    """The weights of an artifact that is in the names of `model`."""
    check_execution(execution)
    schemes = {k: Scheme.from_json(v) for k, v in made.header.get("schemes", {}).items()}
    facts = made.header.get("layers", {})
    return Weights({n: schemes[f["scheme"]] for n, f in facts.items()}, made, execution, simulate)


def rounded(
    model: Any,
    scheme: Scheme,
    skip: tuple[str, ...] = (),
    conv: bool = True,
    execution: str = "int8",
) -> Weights:
    """Every layer of `model` rounded to nearest, but those that a pattern of `skip` matches.

    Patterns match the host's names and the canonical ones. conv: convolutions too.
    """
    check_execution(execution)
    denoiser = model.model.diffusion_model
    keys, recipe = families.key_map_of(denoiser), recipe_for(scheme, describe(denoiser))
    inside = keys.layers() if keys is not None else {}
    chosen = {}
    for name, layer in layers(denoiser):
        known = (name, *inside.get(name, ()))
        rule = recipe.rule(name)
        out = any(fnmatchcase(n, pattern) for n in known for pattern in skip)
        if (
            rule is None
            or rule.scheme is None
            or out
            or (isinstance(layer, nn.Conv2d) and not conv)
        ):
            continue
        if not layer.weight.is_floating_point() or layer.weight.element_size() < 2:
            raise ModelError("The model's weights are quantized already.")
        chosen[name] = rule.scheme
    if not chosen:
        raise ModelError("No layer of the model is left to quantize.")
    return Weights(chosen, execution=execution)


def routed(made: Artifact) -> Policy:
    """The artifact's route at whatever timesteps a run has: the nearest row counts."""
    schedule = schedule_of(made)
    if schedule is None:
        raise ArtifactError("The artifact has no route: make one with `tenuto train-router`.")
    known = schedule

    def policy(times: Sequence[float], branches: Sequence[str]) -> CacheSchedule:
        table = torch.ones(len(known.timesteps), len(branches), dtype=torch.bool)
        for column, name in enumerate(known.branches):
            table[:, branches.index(name)] = known.table[:, column]
        return CacheSchedule(table, known.timesteps, tuple(branches)).at(times)

    return policy
