"""A1111, Forge, Forge Neo and reForge as a host: the `Host` protocol on the host's `sd_model`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tenuto.caching import CacheSchedule, Forecast
from tenuto.errors import ModelError, TenutoError
from tenuto.model import WHOLE, Attached, describe, key_map_of, override_
from tenuto.runtime import (
    Host,
    Patches,
    Replacements,
    as_chosen,
    host_kernel,
    replacements_for,
    with_kernel,
)
from tenuto.sampling import OutputKernel, host_noise

from . import hosts
from .cache import Cache, Limits, Plan
from .forecast import Skips
from .lora import Changes
from .run import Calls, Run
from .weights import SIDE, Weights

GRID = tuple(1000 * (1 - (step + 0.5) / 20) for step in range(20))  # where nothing was measured
SOME = 2.0  # stands for any speedup in what is kept from run to run


@dataclass(frozen=True)
class Chosen(Patches):
    """What the extension's fields say beside. lora: see `Weights`; limits: of the cache.

    by_step: the policy is a rule for the steps of a run, whatever their timesteps. fallback:
    branches are reused in the runs of which no call can be skipped, else in none.
    """

    lora: str = SIDE
    limits: Limits = field(default_factory=Limits)
    by_step: bool = False
    fallback: bool = False


class WebUI(Host):
    """The denoiser is changed in place, for one sampling run. A checkpoint is quantized once."""

    def __init__(self) -> None:
        self._known: tuple[tuple[Any, ...], Weights] | None = None

    def denoiser(self, handle: Any) -> nn.Module:
        """The network inside an `sd_model`, wherever the host has it."""
        return hosts.denoiser_of(handle)

    def install(self, handle: Any, patches: Patches) -> Installed:
        """What is said is done at every step that an artifact knows."""
        chosen = patches if isinstance(patches, Chosen) else Chosen(**vars(patches))
        shipped, why = None, ""
        try:
            shipped = with_kernel(chosen, lambda: host_kernel(hosts.sampling_of(handle))).kernel
        except TenutoError as error:
            if not chosen.fallback:
                raise
            chosen, why = replace(chosen, speedup=None, fallback=False), f"{error}"
        weights = self._weights(handle, chosen, shipped)
        forecast, denoiser = weights.plan.forecast, self.denoiser(handle)
        if forecast is None or chosen.speedup is None:
            plan = plan_of(denoiser, chosen, weights.plan, grid_of(handle))
            return Installed(handle, weights, plan, why=why)
        kernel = shipped or forecast.kernel  # hosts change a checkpoint's schedule by an option
        forecast = replace(forecast, speedup=chosen.speedup, kernel=kernel)
        plan = None
        if chosen.fallback:
            with suppress(ModelError):  # of a class whose branches have no names here
                plan = plan_of(denoiser, chosen, weights.plan, grid_of(handle))
        return Installed(handle, weights, plan, forecast)

    def forget(self) -> None:
        """Another checkpoint: nothing that was made of the last one is kept."""
        self._known = None

    def _weights(self, handle: Any, chosen: Chosen, shipped: OutputKernel | None) -> Weights:
        """Of this checkpoint and choice, or those of the last run where these are the same.

        shipped: what a forecast is planned from where the artifact has no kernel.
        """
        denoiser, changes = self.denoiser(handle), Changes(handle)
        some = None if chosen.speedup is None else SOME
        made_of = replace(
            chosen, policy=None, limit=None, route=True, limits=Limits(), speedup=some,
            by_step=False, fallback=chosen.fallback and chosen.artifact is not None,
        )  # fmt: skip
        token = weakref.ref(denoiser), id(chosen.artifact), replace(made_of, artifact=None)
        if self._known is not None and self._known[0] == token:
            return self._known[1]

        def tensor(name: str) -> Any:
            layer, _, end = name.rpartition(".")
            if end != "weight":
                return denoiser.get_parameter(name)
            return changes.own(layer, denoiser.get_submodule(layer))

        more: Any = {"tensor": tensor, "layers": list(hosts.layers(denoiser))}
        plan = replacements_for(denoiser, as_chosen(replace(made_of, kernel=shipped)), **more)
        if chosen.fallback and chosen.artifact is not None:  # its schedule, beside the forecast
            other = as_chosen(replace(made_of, speedup=None, weights=False))
            plan.policy = replacements_for(denoiser, other, **more).policy
        self._known = token, Weights(plan, chosen)
        return self._known[1]


class Installed(Attached):
    """Patches in a denoiser. They act between `run.evaluates` of their owner and `detach`.

    plan: with a forecast, for runs that it is not for. why: what was chosen and cannot be had.
    """

    def __init__(
        self, handle: Any, weights: Weights, plan: Plan | None, forecast: Forecast | None = None,
        why: str = "",
    ) -> None:  # fmt: skip
        super().__init__(handle, [])
        self.run, self.changes, self.why = Run(), Changes(handle), why
        self.weights, self.cache, self.skips = weights, None, None
        denoiser = hosts.denoiser_of(handle)
        try:
            self.patches.append(Calls(denoiser, self.run))
            self.patches += weights.overrides(denoiser, self.run, self.changes)
            if plan is not None:
                self.cache = Cache(plan, self.run)
                self.patches += self.cache.overrides(denoiser)
            if forecast is not None:
                self.skips = Skips(forecast, denoiser, self.run, self.cache)
                self.patches.append(override_(denoiser, self.skips))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take everything out. What another extension has put on top lets go of ours later."""
        self.run.on = False
        self.weights.ended()
        while self.patches:
            patch = self.patches.pop()
            getattr(patch, "retire", patch.remove)()

    def counts(self) -> dict[str, list[int]]:
        """[computed, reused] calls of every branch, by canonical name.

        Under a forecast: [computed, forecast] calls of the network.
        """
        if self.skips is not None and not self.skips.instead:
            return {WHOLE.name: list(self.skips.counts)}
        if self.cache is None:
            return {}
        keys, names = key_map_of(hosts.denoiser_of(self.handle)), self.cache.plan.branches
        names = tuple(map(keys.canonical, names)) if keys else names
        return {n: list(c.counts) for n, c in zip(names, self.cache.calls, strict=True)}


_branches: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()


def branches_of(denoiser: nn.Module) -> tuple[str, ...]:
    """What can be reused, by the denoiser's own names; ModelError if the class is not known."""
    if denoiser not in _branches:  # it takes a moment, and every image asks
        if not hosts.known_parts(denoiser):
            raise ModelError(f"Tenuto does not know the parts of a {type(denoiser).__name__} yet.")
        _branches[denoiser] = tuple(b.name for b in describe(denoiser).branches)
    return _branches[denoiser]


def grid_of(handle: Any) -> Sequence[float]:
    """`GRID` as the network of this host counts time: some flows have it on 0 to 1."""
    noise = host_noise(hosts.sampling_of(handle))
    short = noise is not None and noise.times[-1] <= 1
    return tuple(t / 1000 for t in GRID) if short else GRID


def plan_of(
    denoiser: nn.Module, chosen: Chosen, made: Replacements, grid: Sequence[float] = GRID
) -> Plan | None:
    """The plan of a run; None where nothing is ever reused. grid: timesteps of a rule's table."""
    policy = chosen.policy or (made.policy if chosen.route else None)
    if policy is None:
        return None
    branches = branches_of(denoiser)
    if chosen.by_step:
        return Plan(branches, policy=policy, limits=chosen.limits)
    schedule = policy if isinstance(policy, CacheSchedule) else policy(grid, branches)
    schedule = chosen.limit(schedule) if chosen.limit is not None else schedule
    if bool(schedule.table.all()):
        return None
    schedule = schedule.over(branches)
    return Plan(schedule.branches, schedule, limits=chosen.limits)
