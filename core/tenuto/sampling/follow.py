"""Follow a denoiser's calls: a hook that keeps a clock at the step, streams and run of each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..model import Signature, denoiser_of
from .clock import Clock, active


class Follow:
    """A hook on the denoiser that keeps a clock at the step, streams and run of each call."""

    def __init__(self, denoiser: nn.Module, clock: Clock, streams: bool = True) -> None:
        self.clock, self.streams = clock, streams
        self.facts = Signature(denoiser)
        self.hook = denoiser.register_forward_pre_hook(self, prepend=True, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = self.facts.inputs(args, kwargs)
        sample = self.facts.sample(inputs)
        conditions = self.facts.conditions(inputs) if self.streams else []
        step = self.facts.timestep(inputs)
        seen = sample if self.streams else None
        self.clock.observe(step, sample.shape[0], conditions, sample.device, seen)

    def __deepcopy__(self, memo: dict[int, Any]) -> Follow:
        clone = type(self).__new__(type(self))
        clone.__dict__.update(self.__dict__, clock=copy.deepcopy(self.clock, memo))
        return clone

    def remove(self) -> None:
        """Take the hook out."""
        self.hook.remove()


@contextmanager
def follow(handle: Any, clock: Clock) -> Iterator[Clock]:
    """Keep `clock` at the step of every call of the denoiser of `handle` (`Host.follow`)."""
    hook = Follow(denoiser_of(handle), clock)
    token = active.set(clock)
    try:
        yield clock
    finally:
        active.reset(token)
        hook.remove()
