"""A1111, Forge and reForge as a host: the `Host` protocol on the host's `sd_model`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tenuto.artifact import Artifact, localized, schedule_of
from tenuto.calibration import recipe_for
from tenuto.errors import ArtifactError, ModelError
from tenuto.model import Attached, KeyMap, describe, families, watched
from tenuto.numerics import Format, Scheme, named, schemes
from tenuto.runtime import Patches, check_execution
from tenuto.sampling import Clock

from . import hosts
from .cache import Cache, Plan
from .lora import Changes
from .plans import spread
from .run import Calls, Run
from .weights import Weights

W6A8 = Scheme("w6a8", Format(6, symmetric=True, ranges="mse"), schemes.W8A8.activation)


class WebUI:
    """The denoiser is changed in place, for one sampling run."""

    def denoiser(self, handle: Any) -> nn.Module:
        """The network inside an `sd_model`, wherever the host has it."""
        return hosts.denoiser_of(handle)

    def names(self, handle: Any) -> KeyMap | None:
        """By the class of the denoiser."""
        return families.key_map_of(self.denoiser(handle))

    def install(self, handle: Any, patches: Patches) -> Installed:
        """The artifact as it is: what it says is done at every step that it knows."""
        made = here(handle, patches.artifact)
        weights = artifact_weights(made, patches.execution, patches.simulate)
        schedule = schedule_of(made) if patches.route else None
        plan = None
        if schedule is not None:
            plan = Plan(spread(schedule, branches_of(self.denoiser(handle))))
        return Installed(handle, weights, plan)

    @contextmanager
    def follow(self, handle: Any, clock: Clock) -> Iterator[Clock]:
        """By a hook on the denoiser; one call after the other, each row a stream of its own."""
        denoiser = self.denoiser(handle)

        def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run.on, run.call = True, -1
            run.called(denoiser, args, kwargs)
            clock.streams = tuple(range(len(args[0])))

        run = Run(clock)
        with watched(denoiser, before=note, first=True):
            yield clock


class Installed(Attached):
    """Patches in a denoiser. They act between `run.evaluates` of their owner and `detach`."""

    def __init__(self, handle: Any, weights: Weights | None, plan: Plan | None) -> None:
        super().__init__(handle, [])
        self.run, self.changes = Run(), Changes(handle)
        self.weights, self.cache = weights, None
        denoiser = hosts.denoiser_of(handle)
        try:
            self.patches.append(Calls(denoiser, self.run))
            if weights is not None:
                self.patches += weights.overrides(denoiser, self.run, self.changes)
            if plan is not None:
                self.cache = Cache(plan, branches_of(denoiser), self.run)
                self.patches += self.cache.overrides(denoiser)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take everything out. What another extension has put on top lets go of ours later."""
        self.run.on = False
        while self.patches:
            patch = self.patches.pop()
            getattr(patch, "retire", patch.remove)()

    def counts(self) -> dict[str, list[int]]:
        """[computed, reused] calls of every branch, by canonical name."""
        if self.cache is None:
            return {}
        keys = families.key_map_of(hosts.denoiser_of(self.handle))
        names = map(keys.canonical, self.cache.branches) if keys else self.cache.branches
        return {n: list(c.counts) for n, c in zip(names, self.cache.calls, strict=True)}


_branches: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()


def branches_of(denoiser: nn.Module) -> tuple[str, ...]:
    """What can be reused, by the denoiser's own names; ModelError if the class is not known."""
    if denoiser not in _branches:  # it takes a moment, and every image asks
        if families.key_map_of(denoiser) is None and not hasattr(denoiser, "config"):
            raise ModelError(f"Tenuto does not know the parts of a {type(denoiser).__name__} yet.")
        _branches[denoiser] = tuple(b.name for b in describe(denoiser).branches)
    return _branches[denoiser]


def here(handle: Any, artifact: Artifact) -> Artifact:
    """`artifact` in the names of the model; ArtifactError in one sentence if it is another's."""
    denoiser, changes = hosts.denoiser_of(handle), Changes(handle)

    def tensor(name: str) -> Any:
        layer, _, end = name.rpartition(".")
        if end != "weight":
            return denoiser.get_parameter(name)
        return changes.own(layer, denoiser.get_submodule(layer))

    found = localized(artifact, denoiser, tensor)
    by_name = dict(denoiser.named_modules())
    schedule = schedule_of(found)
    missing = [n for n in (schedule.branches if schedule else ()) if n not in by_name]
    if missing:
        raise ArtifactError(f"The model has no branch {missing[0]}, which the route names.")
    return found


def artifact_weights(
    made: Artifact, execution: str = "auto", simulate: bool = False, lora: str = "side branch"
) -> Weights | None:
    """The weights and tables of an artifact that is in the model's names; None if it has none."""
    check_execution(execution)
    facts = made.header.get("layers", {})
    if not facts and not made.section("temporal"):
        return None
    known = {k: Scheme.from_json(v) for k, v in made.header.get("schemes", {}).items()}
    chosen = {n: known[f["scheme"]] for n, f in facts.items()}
    return Weights(chosen, made, execution, simulate, lora)


def rounded(
    denoiser: nn.Module, precision: str, execution: str = "auto", lora: str = "side branch"
) -> Weights:
    """Every layer rounded to nearest but the first, the last and those of the timestep."""
    scheme = W6A8 if precision == "W6A8" else named(precision.lower())
    backbone = describe(denoiser)
    recipe = recipe_for(scheme, backbone)
    chosen = {}
    for name, _ in hosts.layers(denoiser):
        rule = recipe.rule(name)
        if rule is not None and rule.scheme is not None and name not in backbone.ends:
            chosen[name] = rule.scheme
    if not chosen:
        raise ModelError("No layer of the model is left to quantize.")
    return Weights(chosen, None, execution, lora=lora)
