"""What nodes that read a file of a models/ folder tell the host of it, by its name there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PathOf = Callable[[str], "str | Path | None"]
NO_FILE = "no file yet"  # the one choice of an empty list, where a page would show "undefined"


def choices(names: list[str]) -> list[str]:
    """What a list offers: the files of a folder, or that there is none."""
    return names or [NO_FILE]


def stamp(path: str | Path) -> tuple[int, int]:
    """Size and time of a file."""
    facts = Path(path).stat()
    return facts.st_size, facts.st_mtime_ns


def fingerprint(name: str, path_of: PathOf) -> Any:
    """For `fingerprint_inputs`: another file of the same name is another input."""
    path = path_of(name)
    return name if path is None else (name, *stamp(path))


def is_there(name: str, path_of: PathOf, missing: Callable[[str], str]) -> bool | str:
    """For `validate_inputs`: a sentence where there is no such file."""
    return True if path_of(name) is not None else missing(name)
