"""The folder of start images and masks: how much it may hold, and what is never taken from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenuto.artifact import read_header
from tenuto.errors import TenutoError
from tenuto.sampling.model_folders import ENDING

from .places import Places

MOST, BYTES = 200, 2 * 2**30  # files, and what all of them may take, beside those that are needed


def bounded(places: Places, requests: Sequence[Mapping[str, Any]]) -> None:
    """Remove what was used longest ago from the folder, until it holds no more than it may.

    requests: of the jobs that run or wait. What they, an unfinished calibration or an artifact of
    the output folder were given stays, and does not count.
    """
    try:
        files = [file for file in places.inputs.glob("*.png") if file.is_file()]
    except OSError:
        return
    sizes = {file: _size(file) for file in files}
    if len(files) <= MOST and sum(size for size, _ in sizes.values()) <= BYTES:
        return
    needed = {*_needed(places, requests)}
    free = [file for file in files if file.name not in needed]
    count, held = 0, 0
    for file in sorted(free, key=lambda file: sizes[file][1], reverse=True):  # the newest first
        count, held = count + 1, held + sizes[file][0]
        if count > MOST or (held > BYTES and count > 1):
            with contextlib.suppress(OSError):
                file.unlink()


def _size(file: Path) -> tuple[int, float]:
    """(bytes, when it was used last); (0, 0) where it is gone by now."""
    try:
        about = file.stat()
    except OSError:
        return 0, 0.0
    return about.st_size, about.st_mtime


def _needed(places: Places, requests: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names of files that something may still ask for."""
    for request in requests:
        yield from _named(request.get("call"))
    for file in (places.out / "unfinished").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            yield from _named(json.loads(file.read_text("utf-8")).get("call"))
    for file in places.out.glob(f"*{ENDING}"):
        with contextlib.suppress(TenutoError, AttributeError):
            header = read_header(file)
            yield from _named(header["schedule"].get("call"))


def _named(call: Any) -> Iterator[str]:
    """The files of the images in a call that is plain data."""
    for value in call.values() if isinstance(call, Mapping) else ():
        file = value.get("file") if isinstance(value, Mapping) else None
        if isinstance(file, str):
            yield file
