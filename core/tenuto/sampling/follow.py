"""Follow a denoiser's calls: a hook that keeps a clock at the step, streams and run of each."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import Tensor, nn

from ..model import Rows, Signature, denoisers_of, outside_graphs, parts_of, tensors_in
from .clock import Clock
from .grid import own_times
from .noise import is_stochastic
from .scheduler_step import TimesOnHost
from .steady_run import SteadyRun


class Follow:
    """A hook on the denoiser that keeps a clock at the step, streams and run of each call.

    handle: the denoiser, or the pipeline that has it; part: which of its denoisers (`parts_of`). A
    pipeline's call sets the timesteps of its scheduler anew, whichever that is by then: nothing is
    put into either to notice it. What is put into a scheduler, see `TimesOnHost`, changes no value.
    """

    def __init__(self, handle: Any, clock: Clock, streams: bool = True, part: str = "") -> None:
        denoiser = parts_of(handle)[part]
        self.name = part or next(iter(denoisers_of(handle)))
        self.clock, self.streams = clock, streams
        self.pipeline = None if isinstance(handle, nn.Module) else weakref.ref(handle)
        self.facts = Signature(denoiser)
        self.steady: SteadyRun | None = None  # of the run of a pipeline
        self.on_host = TimesOnHost()
        self.hook = denoiser.register_forward_pre_hook(self, prepend=True, with_kwargs=True)

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = self.facts.inputs(args, kwargs)
        sample, count = self.facts.sample(inputs), self.facts.batch(inputs)
        step, device = self.facts.timestep(inputs), next(tensors_in(sample)).device
        pipeline = self.pipeline() if self.pipeline is not None else None
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not None:
            times = getattr(scheduler, "timesteps", None)
            if self.clock.starts(scheduler, times, times=times):
                self.clock.among(own_times(pipeline, times, self.name))
                self.clock.uneven = getattr(scheduler, "order", 1) > 1 or _turns(times)
                self.clock.per_step = _per_step(times, scheduler)
                self.clock.stochastic = is_stochastic(scheduler)
                self.steady = SteadyRun(times, self.clock.uneven)
                self.on_host.put(scheduler, times)
        if self.streams:
            conditions = self.facts.conditions(inputs)
            self._observe(step, count, conditions, device, sample, self.facts.which(inputs))
        else:
            self.clock.observe(step, count, (), device)

    def _observe(
        self, step: Any, count: int, conditions: list[Rows], device: Any, sample: Rows, which: str
    ) -> None:
        """Move the clock; the device is read where objects don't say which call this is."""
        steady = self.steady
        known = steady.find(step, count, conditions, which) if steady is not None else None
        if known is not None:
            self.clock.tick(*known, device)
            return
        seen = None if steady is not None and steady.calm else sample
        self.clock.observe(step, count, conditions, device, seen, which)
        if steady is not None:
            steady.learn(self.clock.time, self.clock.streams, count, conditions, which)

    def __deepcopy__(self, memo: dict[int, Any]) -> Follow:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(self.__dict__)
        clone.clock, clone.steady = copy.deepcopy(self.clock, memo), None
        clone.on_host = TimesOnHost()
        pipeline = self.pipeline() if self.pipeline is not None else None
        copied = memo.get(id(pipeline))  # where the whole pipeline is copied
        if pipeline is not None and copied is not None:
            clone.pipeline = weakref.ref(copied)
        return clone

    def remove(self) -> None:
        """Take the hook out."""
        self.hook.remove()
        self.on_host.remove()


def _turns(times: Any) -> bool:
    """Whether a scheduler's timesteps go both up and down."""
    if not isinstance(times, Tensor) or times.numel() < 3:
        return False
    steps = times.detach().cpu().flatten().double().diff()
    return bool((steps > 0).any() and (steps < 0).any())


def _per_step(times: Any, scheduler: Any) -> float:
    """How many of a scheduler's timesteps a step has: two of KDPM2's, one of Heun's.

    One that comes twice in a row counts once.
    """
    steps = getattr(scheduler, "num_inference_steps", None)
    if not isinstance(times, Tensor) or not isinstance(steps, int) or steps < 1:
        return 1.0
    return max(1.0, len(times.detach().flatten().unique_consecutive()) / steps)
