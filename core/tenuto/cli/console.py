"""What the command shows: an answer in lines that fit a terminal; bars are in `progress.py`."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

from ..progress import WIDTH, Bars

__all__ = ["Answer", "Bars"]


@dataclass(frozen=True)
class Answer:
    """What a command found: text for people, plain data for `--json`, and what to do next.

    code: the exit code.
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    next: str = ""
    code: int = 0

    def __str__(self) -> str:
        """The text in lines of at most 80 columns (but for what cannot be broken), then `next`."""
        lines = [part for line in self.text.splitlines() for part in _fitted(line)]
        return "\n".join([*lines, *([f"Next: {self.next}"] if self.next else [])])


def _fitted(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    found = textwrap.wrap(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return found if len(line) > WIDTH else [line]
