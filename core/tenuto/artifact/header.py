"""Read and check the header of an artifact's file before any tensor is read.

Lengths, offsets, types and shapes are safetensors' to check; here is what it cannot know.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ArtifactError
from ..text import printable

VERSION = "1.4"  # 1.1: groups of columns; 1.2: text encoders, a scale per column; 1.3: parts;
# 1.4: tables of curves in int8. A file has the lowest version that knows all that it has.
JOINED, ALONE = "1.3", "1.2"  # of a file with parts, without
PART = re.compile(r"[a-z]\w{0,63}", re.ASCII)  # what a part is called: a component of a pipeline
KEY = "tenuto"
HEADER_LIMIT = 64 * 2**20  # characters of our part; that of a real artifact is far smaller
DIGITS = 18  # of a whole number: all of them fit 64 bits
WRONG = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError)


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON header of an artifact, read and checked without touching the tensors."""
    with opened(path, "np") as (header, _):
        return header


@contextmanager
def opened(path: str | Path, framework: str = "pt") -> Iterator[tuple[dict[str, Any], Any]]:
    """(checked header, the open safetensors file); ArtifactError if either cannot be read."""
    path = Path(path)
    try:
        with path.open("rb"):  # the system says better than safetensors why it cannot be
            pass
        with safe_open(str(path), framework=framework) as file:
            yield _parse(file.metadata() or {}, path), file
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror or printable(error)}.") from error
    except SafetensorError as error:
        said = str(error).removeprefix("Error while deserializing header: ").rstrip(".")
        raise ArtifactError(
            f"{path} is not an artifact, or it is truncated or damaged: {printable(said)}."
        ) from error


def _parse(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    wrong = f"{path} is a safetensors file, but not a Tenuto artifact."
    text = metadata.get(KEY, "")
    if len(text) > HEADER_LIMIT:
        raise ArtifactError(f"{path} is not an artifact: its header is too long.")
    try:
        header = json.loads(text, parse_int=_whole)
        if "format" in header and "format_version" not in header:
            wrong = (
                f"{path} is a model that Tenuto exported: give the artifact that it was made of."
            )
        version = str(header["format_version"])
    except WRONG as error:
        raise ArtifactError(wrong) from error
    if version.split(".")[0] != VERSION.split(".")[0]:
        raise ArtifactError(
            f"{path} has format version {printable(version, 40)}; this Tenuto reads {VERSION}."
        )
    try:
        _check_kept(header)
        for name, part in dict(header.get("parts", {})).items():
            if not PART.fullmatch(name) or "parts" in part:
                raise ValueError("no such part")
            _check_kept(part)
    except WRONG as error:
        raise ArtifactError(wrong) from error
    return header


def _check_kept(header: dict[str, Any]) -> None:
    """One of WRONG unless what is always there is, of an artifact or of a part of one."""
    _ = str(header["family"]), str(header["model_class"]), dict(header["made"])
    schedule = dict(header["schedule"])
    about = (schedule.get(key) for key in ("steps", "guidance"))
    check_numbers([*schedule["timesteps"], *(v for v in about if v is not None)])
    check_numbers(list(schedule.get("run", [])))
    check_fingerprint(header["fingerprint"])


def _whole(digits: str) -> int:
    if len(digits) > DIGITS + 1:
        raise ValueError("a whole number of more than 64 bits")
    return int(digits)


def check_numbers(values: Any) -> None:
    """One of WRONG unless these are finite numbers."""
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise ValueError("not a finite number")


def check_fingerprint(facts: dict[str, Any]) -> None:
    """One of WRONG unless it is the fingerprint of a model: an infinite one would fit any."""
    if not isinstance(facts["parameters"], int) or facts["parameters"] < 1 or not facts["values"]:
        raise ValueError("the fingerprint of no weights")
    check_numbers(facts["values"])
