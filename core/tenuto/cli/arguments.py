"""Types of the command's arguments; each complaint is one sentence, without the argument's name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def whole(least: int) -> Callable[[str], int]:
    """An argument type: whole numbers from `least` on."""

    def parse(given: str) -> int:
        try:
            value = int(given)
        except ValueError:
            value = least - 1
        if not least <= value < 2**62:
            raise argparse.ArgumentTypeError(
                f"takes a whole number of {least} or more, not {given}"
            )
        return value

    return parse


def real(low: float, high: float, open_low: bool = False) -> Callable[[str], float]:
    """An argument type: finite numbers from `low` (or above it) to below `high`."""

    def parse(given: str) -> float:
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if not (low < value < high if open_low else low <= value < high):
            above = "above" if open_low else "from"
            most = "" if high == math.inf else f" to below {high:g}"
            raise argparse.ArgumentTypeError(f"takes a number {above} {low:g}{most}, not {given}")
        return value

    return parse


def text(value: str) -> str:
    """An argument type: text with something in it."""
    if not value.strip():
        raise argparse.ArgumentTypeError("takes some text")
    return value
