"""What the pipeline's call in progress was given, that no input of its denoiser tells.

Guidance, and whether the scheduler is asked to add noise. Not every pipeline keeps them: they are
looked up where they are, in the call itself, from within it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..model import uncompiled
from .noise import NOISY
from .pipeline_call import GUIDANCE, TRUE_CFG

DEEPEST = 60  # calls between a pipeline's and its denoiser's


@dataclass(frozen=True)
class CallInProgress:
    """guidance: of u + guidance * (c - u), 1 where there is none; None: not known.

    noisy: whether every step is asked to add noise.
    """

    guidance: float | None = None
    noisy: bool = False


def call_in_progress(denoiser: nn.Module) -> CallInProgress:
    """The call of the pipeline that calls `denoiser` now; nothing is known where there is none."""
    frame = sys._getframe(1)
    for _ in range(DEEPEST):
        if frame.f_back is None:
            break
        frame = frame.f_back
        if frame.f_code.co_name != "__call__":
            continue
        found = frame.f_locals
        pipe: Any = found.get("self")
        parts = vars(pipe).values() if hasattr(pipe, "scheduler") else ()
        if any(isinstance(p, nn.Module) and uncompiled(p) is denoiser for p in parts):
            return CallInProgress(_guidance(found), _noisy(pipe.scheduler, found))
    return CallInProgress()


def _guidance(found: Mapping[str, Any]) -> float | None:
    """By the name that a classic guidance has: of distilled models it is another than usual."""
    name = next((n for n in (TRUE_CFG, *GUIDANCE[:1]) if n in found), None)
    value = found.get(name) if name is not None else None
    return max(1.0, float(value)) if isinstance(value, int | float) else None


def _noisy(scheduler: Any, found: Mapping[str, Any]) -> bool:
    """Whether the scheduler's step gets what makes it add noise."""
    given = found.get("extra_step_kwargs")
    if not isinstance(given, Mapping):
        known = inspect.signature(scheduler.step).parameters
        given = {name: found.get(name) for name in NOISY if name in known}
    return any(isinstance(x, int | float) and x > 0 for x in map(given.get, NOISY))
