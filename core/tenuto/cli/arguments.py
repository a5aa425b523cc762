"""Types of the command's arguments, and spellings that typer does not know.

Each complaint is one sentence, without the argument's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Sequence
from pathlib import Path


def whole(least: int) -> Callable[[str | int], int]:
    """An argument type: whole numbers from `least` on."""

    def parse(given: str | int) -> int:
        try:
            value = int(given)
        except ValueError:
            value = least - 1
        if not least <= value < 2**62:
            raise ValueError(f"takes a whole number of {least} or more, not {given}")
        return value

    return parse


def real(low: float, high: float, open_low: bool = False) -> Callable[[str | float], float]:
    """An argument type: finite numbers from `low` (or above it) to below `high`."""

    def parse(given: str | float) -> float:
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if not (low < value < high if open_low else low <= value < high):
            above = "above" if open_low else "from"
            most = "" if high == math.inf else f" to below {high:g}"
            raise ValueError(f"takes a number {above} {low:g}{most}, not {given}")
        return value

    return parse


def size(given: str | int) -> int:
    """An argument type: bytes, such as 10GiB, 10GB or 800MiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(given).upper())
    if found is None:
        raise ValueError(f"takes a size such as 10GiB or 800MB, not {given}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))


def speedup(given: str | float) -> float | str:
    """An argument type: a number from 1 on, or auto."""
    if given == "auto":
        return "auto"
    try:
        return real(1, math.inf)(given)
    except ValueError as error:
        raise ValueError(f"{error} (or auto)") from error


def text(value: str) -> str:
    """An argument type: text with something in it."""
    if not value.strip():
        raise ValueError("takes some text")
    return value


def with_command(arguments: Sequence[str], known: Container[str]) -> list[str]:
    """Arguments of `tenuto` with the command that is meant where they name none.

    `tenuto` is its help, and `tenuto MODEL` is `tenuto check MODEL`, which changes nothing. A
    model is `demo:NAME`, what has a slash in it, or a folder or file that is there.
    """
    if not arguments:
        return ["--help"]
    first = arguments[0]
    if first in known or first.startswith("-"):
        return list(arguments)
    model = first.startswith("demo:") or "/" in first or Path(first).exists()
    return ["check", *arguments] if model else list(arguments)


def spelled(
    arguments: Sequence[str], optional: Sequence[str] = (), many: Sequence[str] = ()
) -> list[str]:
    """Arguments as typer reads them: every option with exactly one value.

    The options `optional` may stand without one: it becomes empty (`--plot` is `--plot=`). Those
    in `many` may have several (`--roots A B` is `--roots A --roots B`).
    """
    found, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*found, argument, *rest]
        values = []
        while rest and not rest[0].startswith("-") and argument in (*optional, *many):
            values.append(rest.pop(0))
            if argument in optional:
                break
        if argument in optional and not values:
            argument += "="
        found += [part for value in values for part in (argument, value)] or [argument]
    return found
