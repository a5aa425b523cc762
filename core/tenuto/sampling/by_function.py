"""Whether a sampling function of k-diffusion's kind adds noise of its own, and at which times.

ComfyUI and the WebUIs sample by such functions: function(model, x, sigmas, ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .noise import STOCHASTIC

WORDS = (*STOCHASTIC, "restart", "seeds", "sa_solver", "ar_video")  # in names of functions


def adds_noise(function: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    """Whether `function` adds noise at every step, by what it is called with beside the sigmas.

    `eta` says how much of it where there is such an option, `s_churn` how much more; of a function
    without them its name tells.
    """
    if _number(options.get("s_churn")) > 0:
        return True
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        known = {}
    if "eta" in options:
        return _number(options["eta"]) > 0
    if "eta" in known:
        return _number(known["eta"].default) > 0
    name = getattr(function, "__name__", type(function).__name__).lower()
    return any(word in name for word in WORDS)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def visited_once(times: Sequence[float]) -> tuple[float, ...]:
    """The timesteps of a run, of equal ones in a row the first: near its end a host rounds them."""
    found: list[float] = []
    for time in times:
        if not found or float(time) != found[-1]:
            found.append(float(time))
    return tuple(found)


def goes_as(times: Sequence[float], known: Sequence[float]) -> bool:
    """Whether a run goes one way all along, and the same way as the `known` timesteps."""
    falls = known[0] > known[-1]
    return all(a != b and (a > b) == falls for a, b in pairwise(times))
