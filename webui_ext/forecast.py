"""Whole calls of the network that are skipped and forecast, and the sampler that says its steps."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tenuto.caching import Forecast, ForecastCalls, forecast_run, said_of, why_none
from tenuto.sampling import adds_noise

from . import hosts
from .cache import Cache
from .run import Run

log = logging.getLogger("tenuto")

UNKNOWN = "No call is skipped: this sampler does not say its steps before it begins."
INSTEAD = ", so blocks are reused instead."


class Skips:
    """The forward of the network: computed, or forecast as the plan of the run says.

    counts: calls computed and forecast, of all runs. why: a sentence where nothing is skipped.
    It lies round whatever has the forward: what ControlNet adds inside is skipped with the call.
    cache: acts in runs of which nothing can be skipped, from where that shows, and in no others.
    """

    def __init__(
        self, forecast: Forecast, denoiser: nn.Module, run: Run, cache: Cache | None = None
    ) -> None:
        self.forecast, self.denoiser, self.run, self.cache = forecast, denoiser, run, cache
        self.counts, self.why = [0, 0], UNKNOWN
        self.calls: ForecastCalls | None = None
        self._stamp = (-1, -1)
        self._astray = -1  # the last evaluation at none of the steps that were said

    @property
    def instead(self) -> bool:
        """Whether branches are reused now, and no call is skipped."""
        return self.cache is not None and self.cache.on

    def said(self) -> str:
        """Why nothing was skipped, in one sentence; "" where something was."""
        why = self.why or ("" if self.calls is None else why_none(self.calls))
        return instead(why, self.cache)

    def predicted(self) -> str:
        """What skipping is likely to have cost, in one sentence; "" where nothing was skipped."""
        return "" if self.calls is None else said_of(self.calls)

    def begins(self, times: list[float], stochastic: bool, guidance: float | None = None) -> None:
        """A run at these timesteps begins; what was stored belongs to the last one."""
        if self.calls is not None:
            self.run.clocks.remove(self.calls.clock)
            self.calls = None
        self.why = UNKNOWN
        if times:
            given = self.forecast, times, self.denoiser, stochastic, guidance
            self.calls, self.why = forecast_run(*given)
            self.run.clocks.append(self.calls.clock)
        if self.cache is not None:
            self.cache.on, self._astray = bool(self.why), -1

    def _lost(self, calls: ForecastCalls, module: nn.Module) -> bool:
        """Whether this run goes its own way, twice in a row, or has a hook that reads along.

        Once in a row is a second-order sampler between two of its steps.
        """
        if calls.step(module) is not None:
            return bool(calls.patch)
        before, self._astray = self._astray, self.run.evaluation
        return before == self.run.evaluation - 1 and before >= 0

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run, calls = self.run, self.calls
        stamp = run.evaluation, run.call
        usual = run.on and run.call >= 0 and not run.mixed and stamp != self._stamp
        if not usual:  # of somebody else's images, or not through the hook that counts calls
            return original(*args, **kwargs)
        self._stamp = stamp
        if self.cache is not None and not self.cache.on and calls is not None:
            self.cache.on = not calls.counts[1] and self._lost(calls, module)
        if calls is None or self.instead:
            self.counts[0] += 1
            return original(*args, **kwargs)
        before = calls.counts[1]
        out = calls(original, module, *args, **kwargs)
        self.counts[calls.counts[1] > before] += 1
        return out


def instead(why: str, cache: Cache | None) -> str:
    """`why` no call is skipped, and that branches were reused, if so; "" where `why` is."""
    return why.rstrip(".") + INSTEAD if why and cache is not None and cache.reused else why


class Watched:
    """A host's sampler, whose function says what it is called with before it begins.

    It is put in for one sampling pass. says: gets timesteps, whether noise is added, and guidance.
    """

    def __init__(self, sd_model: Any, sampler: Any, says: Callable[..., None]):
        self.sampler, self.own = sampler, getattr(sampler, "func", None)
        if not callable(self.own):
            return
        own, self.on = self.own, True

        @functools.wraps(own)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.on:
                try:
                    given = inspect.signature(own).bind_partial(*args, **kwargs).arguments
                    given |= kwargs
                    guidance = (given.get("extra_args") or {}).get("cond_scale")
                    says(times_of(sd_model, sampler, given), adds_noise(own, given), guidance)
                except Exception as error:  # of a host that we do not know: it computes everything
                    log.debug("Tenuto does not know the steps of this sampler", exc_info=error)
            return own(*args, **kwargs)

        self.put = sampler.func = watched

    def remove(self) -> None:
        """Give the sampler its function back; under another one's, do nothing from now on."""
        self.on = False
        if callable(self.own) and self.sampler.func is self.put:
            self.sampler.func = self.own


def times_of(sd_model: Any, sampler: Any, given: dict[str, Any]) -> list[float]:
    """The timesteps that a sampling function will go to, in executed order; [] where unknown.

    given: its arguments by name. They have sigmas of which the last is where it ends, or the
    timesteps themselves, in rising order.
    """
    if given.get("timesteps") is not None:
        return sorted(torch.as_tensor(given["timesteps"]).tolist(), reverse=True)
    sigmas = given.get("sigmas", given.get("sigma_sched"))
    if sigmas is None:
        return []
    known = sigmas.detach().float()[:-1]
    found = hosts.timesteps(sd_model, sampler, known).detach().double().reshape(-1)
    whole = found.round()  # hosts find 700 by way of logarithms, as 700.0001
    return torch.where((found - whole).abs() <= found.amax() * 1e-6, whole, found).tolist()
