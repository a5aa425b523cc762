"""What stands in for a scheduler's `step` for a while."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .steady_run import place_in


class StandsIn:
    """In the place of a scheduler's step; a copy of the scheduler has its own step again.

    owner: the scheduler, as it is before this is put into it.
    """

    def __init__(self, owner: Any, call: Callable[..., Any]) -> None:
        self.owner, self.call = owner, call
        self.__signature__ = inspect.signature(owner.step)  # pipelines ask it what it takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.owner), self.owner)
        return types.MethodType(type(copied).step, copied)


class TimesOnHost:
    """Hands a scheduler its timesteps in host memory, where they are on a GPU.

    DDIM, DDPM and PNDM look tables up by the timestep. One on a GPU is read for that at every step,
    which waits until all that was asked of the GPU is done: then it has nothing to do while the
    next call is prepared. Schedulers that count their steps (`step_index`) don't read it.
    """

    def __init__(self) -> None:
        self.scheduler: Any = None  # the one that it is put into
        self.stand: StandsIn | None = None
        self.times: Tensor | None = None
        self.known: tuple[Tensor, ...] = ()

    def put(self, scheduler: Any, times: Any) -> None:
        """Into `scheduler`, for a run of its timesteps (T,); it stays there until `remove`."""
        if scheduler is not self.scheduler or scheduler.__dict__.get("step") is None:
            self.remove()
            if not _reads(scheduler, times):
                return
            self.scheduler = scheduler
            self.stand = StandsIn(scheduler, partial(self._step, scheduler))
            scheduler.__dict__["step"] = self.stand
        self.times, self.known = times, times.detach().cpu().unbind()

    def remove(self) -> None:
        """Out of the scheduler, unless something else has taken the place since."""
        if self.stand is not None and self.scheduler.__dict__.get("step") is self.stand:
            del self.scheduler.__dict__["step"]
        self.scheduler, self.stand, self.times, self.known = None, None, None, ()

    def _step(self, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 1:
            args = (args[0], self._here(args[1]), *args[2:])
        elif "timestep" in kwargs:
            kwargs["timestep"] = self._here(kwargs["timestep"])
        return type(scheduler).step(scheduler, *args, **kwargs)

    def _here(self, timestep: Any) -> Any:
        """A timestep on the host, where it is one of the run's."""
        if not isinstance(timestep, Tensor) or timestep.ndim:
            return timestep
        place = place_in(self.times, timestep)
        return timestep if place is None else self.known[place]


def _reads(scheduler: Any, times: Any) -> bool:
    """Whether a scheduler reads its timesteps, and nobody else has taken its step's place."""
    counts = hasattr(scheduler, "step_index")
    return not counts and "step" not in vars(scheduler) and _on_device(times)


def _on_device(times: Any) -> bool:
    return isinstance(times, Tensor) and times.ndim == 1 and times.device.type != "cpu"
