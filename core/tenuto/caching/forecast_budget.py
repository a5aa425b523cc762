"""The budget of a forecast: how many calls a speedup leaves, and what an error is in dB."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias

from ..errors import TenutoError

log = logging.getLogger("tenuto")

Speedup: TypeAlias = "float | Literal['auto']"
AUTO: Literal["auto"] = "auto"
SAFE = 3e-4  # the largest predicted error that "auto" allows
AT_ONE = 13.5  # dB of an error of 1, in the demo models' latents: others may differ by some dB
LEAST = 35.0  # dB below which there is a warning
FOREIGN = "not measured on your model"


def check_speedup(given: Any, most: float = math.inf) -> Speedup:
    """A number from 1 to `most`, or "auto"; TenutoError if it is neither."""
    if given == AUTO:
        return AUTO
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not 1 <= given <= most:
        said = f"{given:g}" if number else repr(given)[:40]
        raise TenutoError(f'A speedup is a number from 1 on, such as 1.8, or "auto", not {said}.')
    return given


def calls_for(errors: Mapping[int, float], steps: int, speedup: Speedup) -> int:
    """How many of `steps` calls are computed at a speedup. errors: predicted, by calls.

    "auto": the fewest whose predicted error is at most `SAFE`, all where there are none.
    """
    if speedup == AUTO:
        return min((calls for calls, error in errors.items() if error <= SAFE), default=steps)
    return min(steps, max(int(steps / speedup + 1e-6), min(errors, default=steps)))


def about_db(error: float, at_one: float = AT_ONE) -> float:
    """About which PSNR of images in dB goes with a predicted error; at most 100."""
    return min(100.0, at_one - 10 * math.log10(max(error, 1e-30)))


def predicted(db: float, foreign: bool) -> str:
    """What a plan is likely to cost, as a sentence. foreign: its kernel is not of this model."""
    whose = f"; by the forecast that ships, {FOREIGN}" if foreign else ""
    return (
        f"Predicted: about {db:.0f} dB PSNR to the image with every call (higher is nearer{whose})."
    )


_told = ContextVar("told", default=True)


@contextmanager
def untold() -> Iterator[None]:
    """Within, plans are made to be measured: nobody has asked for one, so none is warned of."""
    token = _told.set(False)
    try:
        yield
    finally:
        _told.reset(token)


def say(why: str, known: set[str]) -> None:
    """Warn that a run skips nothing, and why; once where `known` holds what was said."""
    if _told.get() and why not in known:
        known.add(why)
        log.warning("%s", why)


def tell(calls: int, steps: int, db: float, foreign: bool) -> bool:
    """Warn of a plan that is bad, or whose kernel is not of this model; whether it was the time."""
    if not _told.get():
        return False
    if calls >= steps or not (foreign or db < LEAST):
        return True
    more = " This changes images visibly: ask for less." if db < LEAST else ""
    share = f"{steps - calls} of {steps} calls"
    log.warning("%s are skipped. %s%s", share, predicted(db, foreign), more)
    return True
