"""Numbers as a user gives them: checked, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tenuto.errors import TenutoError


def given(value: Any, kind: Callable[..., Any], *limits: Any) -> Any:
    """`kind` of a value, or None where none was given."""
    empty = value is None or (isinstance(value, str) and not value.strip())
    return None if empty else kind(value, *limits)


def whole(value: Any, what: str, least: int, most: int) -> int:
    """A whole number between two others; TenutoError, which says `what` it is, for any other."""
    found = real(value, what, least, most)
    if found % 1:
        raise TenutoError(f"{what} is a whole number, not {value}.")
    return int(found)


def real(value: Any, what: str, least: float, most: float) -> float:
    """A number between two others; TenutoError, which says `what` it is, for any other."""
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise TenutoError(f"{what} is a number from {least:g} to {most:g}.") from error
    if not least <= found <= most:
        raise TenutoError(f"{what} is a number from {least:g} to {most:g}, not {found:g}.")
    return found
