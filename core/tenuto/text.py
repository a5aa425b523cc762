"""Words of a file or a model, made fit to be shown."""

from __future__ import annotations

LIMIT = 200  # characters: longer than any name that is meant to be read


def printable(words: object, limit: int = LIMIT) -> str:
    """`words` as one line of at most `limit` characters that no terminal takes for a command.

    Line ends, control characters and marks of direction are escaped; what is beyond is left out.
    """
    text = str(words)
    parts = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    shown = "".join(parts)
    return shown if max(len(text), len(shown)) <= limit else f"{shown[: limit - 3]}..."
