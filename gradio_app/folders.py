"""Folders of models that are added on the page: kept in the output folder for the next start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tenuto.errors import TenutoError
from tenuto.files import write_text

from .given import disk_told, words
from .places import LENGTH

if TYPE_CHECKING:
    from .bench import Bench

FILE = "folders.json"
MANY = 50
LISTENS = "Other machines use this app: its folders are those that it was started with (--roots)."


def kept(out: Path) -> list[Path]:
    """The folders that were added before and are still there."""
    try:
        found = json.loads((out / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    names = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    return [Path(name) for name in names[:MANY] if Path(name).is_absolute() and Path(name).is_dir()]


@disk_told()
def added(bench: Bench, name: str) -> int:
    """Add a folder; returns how many models there are by now.

    TenutoError where it is none, or where other machines may come.
    """
    if bench.settings.listen:
        raise TenutoError(LISTENS)
    text = words(name, "A folder", LENGTH)
    try:
        folder = Path(text).expanduser().resolve() if text else None
        there = folder is not None and folder.is_dir()
    except (OSError, ValueError, RuntimeError):
        folder, there = None, False
    if folder is None or not there:
        raise TenutoError("There is no such folder on this machine.")
    places = bench.places
    if folder not in (*places.roots, *places.added):
        if len(places.added) >= MANY:
            raise TenutoError(f"There are {MANY} folders already.")
        places.added.append(folder)
        write_text(places.out / FILE, json.dumps([str(p) for p in places.added], indent=1) + "\n")
    return len(places.models())
