"""`Run`: where a sampling run is, from the host's callback and the denoiser's calls."""

from __future__ import annotations

import logging
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tenuto.model import patches_on
from tenuto.sampling import Clock

log = logging.getLogger("tenuto")


class Run:
    """State that every patch of one sampling run looks at.

    on: whether the patches act: not in a nested run of somebody else, not after a failure.
    evaluation: counts the host's evaluations; call: which denoiser call in it, from 0.
    epoch: grows where what was stored is of no use: another sampler, or back to more noise.
    step, steps: where the host's sampler is. tag: what the host says of the rows of a call.
    mixed: whether these are at several timesteps.
    """

    def __init__(self, *clocks: Clock) -> None:
        self.clocks = list(clocks)
        self.on = False
        self.evaluation, self.call, self.epoch = -1, -1, 0
        self.step, self.steps = 0, 1
        self.tag: Any = None
        self.mixed = False
        self.failed: str | None = None
        self.evaluations = 0  # with the patches on
        self._time = math.inf
        self._source: weakref.ref[Any] | None = None

    def begin(self) -> None:
        """Whatever was stored belongs to the last run."""
        self.epoch += 1
        self._time = math.inf
        for clock in self.clocks:
            clock.begin()

    def evaluates(self, step: int, steps: int, source: Any) -> None:
        """The host is about to evaluate the model. source: what does so, a sampler's denoiser."""
        if self._source is None or self._source() is not source:
            self._source = weakref.ref(source)
            self.begin()
        self.step, self.steps = step, max(steps, 1)
        self.evaluation += 1
        self.call = -1
        self.on = self.failed is None
        self.evaluations += self.on

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the denoiser: its second argument is the timestep, (B,)."""
        if not self.on:
            return
        self.call += 1
        names = (name for name in ("timesteps", "timestep") if name in kwargs)
        times = kwargs[next(names)] if len(args) < 2 else args[1]
        options = kwargs.get("transformer_options") or {}
        self.tag = tuple(options.get("cond_or_uncond") or ()), patches_on(options)
        flat = torch.as_tensor(times).detach().reshape(-1)
        first, spread = float(flat[0]), 0.0
        if len(flat) > 1 and flat.stride(0):
            spread = float(flat.amax() - flat.amin())
        self.mixed = bool(spread)
        if first > self._time * (1 + 1e-6):
            self.begin()
        self._time = first
        device, batch = _place(args, kwargs)
        streams = [(self.tag, self.call, batch, row) for row in range(batch)]
        for clock in self.clocks:
            clock.tick(first, streams, device)
            clock.exact = clock.exact and not spread

    @property
    def last(self) -> bool:
        """Whether this is the sampler's last step."""
        return self.step >= self.steps - 1

    def fail(self, sentence: str) -> None:
        """Nothing acts from here on: the image goes on in full precision."""
        if self.failed is None:
            log.warning("Tenuto: %s The image goes on in full precision.", sentence)
        self.on, self.failed = False, self.failed or sentence


def _place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device, int]:
    """Device and batch of a call."""
    first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    return first.device, len(first)


class Calls:
    """The hook that lets `run` see the denoiser's calls; a patch like others."""

    def __init__(self, denoiser: nn.Module, run: Run) -> None:
        self.hook = denoiser.register_forward_pre_hook(run.called, prepend=True, with_kwargs=True)

    def remove(self) -> None:
        """Take it out."""
        self.hook.remove()
