"""Words of a file or a model, made fit to be shown."""

from __future__ import annotations

import re

LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")
LIMIT = 200  # characters: longer than any name that is meant to be read


def printable(words: object, limit: int = LIMIT) -> str:
    """`words` as one line of at most `limit` characters that no terminal takes for a command.

    Line ends, control characters and marks of direction are escaped; what is beyond is left out.
    """
    text = str(words)
    parts = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    shown = "".join(parts)
    return shown if max(len(text), len(shown)) <= limit else f"{shown[: limit - 3]}..."


def first_line(error: BaseException, limit: int = 120) -> str:
    """The first line of what an error says, at most `limit` characters of it."""
    return str(error).strip().partition("\n")[0][:limit]


def lines_of(text: str) -> list[str]:
    """The lines of a text, each with its end: "\\n", "\\r\\n" or "\\r".

    Nothing else ends one, unlike for `str.splitlines`: U+2028 or a form feed is part of a prompt.
    """
    return LINE.findall(text)


def prompts_of(text: str) -> list[str]:
    """The prompts in a text that has one a line; empty lines are left out."""
    return [line for line in map(str.strip, lines_of(text)) if line]
