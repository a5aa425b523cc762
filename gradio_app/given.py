"""Numbers and texts as a user gives them: checked, or refused in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenuto.errors import TenutoError


def given(value: Any, kind: Callable[..., Any], *limits: Any, absent: Any = None) -> Any:
    """`kind` of a value, or `absent` where none was given."""
    empty = value is None or (isinstance(value, str) and not value.strip())
    return absent if empty else kind(value, *limits)


def whole(value: Any, what: str, least: int, most: int) -> int:
    """A whole number between two others; TenutoError, which says `what` it is, for any other."""
    found = real(value, what, least, most)
    if found % 1:
        raise TenutoError(f"{what} is a whole number, not {found:g}.")
    return int(found)


def real(value: Any, what: str, least: float, most: float) -> float:
    """A number between two others; TenutoError, which says `what` it is, for any other."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if math.isnan(found):
        raise TenutoError(f"{what} is a number from {least:g} to {most:g}.")
    if not least <= found <= most:
        raise TenutoError(f"{what} is a number from {least:g} to {most:g}, not {found:g}.")
    return found


@contextmanager
def disk_told() -> Iterator[None]:
    """Turn what the system says of files, a full disk say, into one sentence."""
    try:
        yield
    except OSError as error:
        where = f" {Path(str(error.filename)).name}" if error.filename else ""
        raise TenutoError(f"Cannot write{where}: {error.strerror or error}.") from error


def words(value: Any, what: str, most: int) -> str:
    """A text without the space around it; TenutoError where it is none, or one of too many."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TenutoError(f"{what} is a text.")
    text = value.strip()
    if len(text) > most:
        raise TenutoError(f"{what} has {len(text)} characters: at most {most} are taken.")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise TenutoError(f"{what} has half a character, which no file can hold.")
    return text
