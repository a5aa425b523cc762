"""Read and check the header of an artifact's file before any tensor is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from ..errors import ArtifactError

VERSION = "1.2"  # 1.1: groups of columns; 1.2: text encoders, a scale per column
KEY = "tenuto"
HEADER_LIMIT = 64 * 2**20  # bytes; a header of a real artifact is far smaller


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON header of an artifact, read and checked without touching the tensors."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ArtifactError(
                    f"{path} is not an artifact: its header is missing or too long."
                )
            table = json.loads(file.read(length))
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a safetensors file.") from error
    _check_table(table, size - 8 - length, path)
    return _parse(table, path)


def _check_table(table: Any, room: int, path: Path) -> None:
    """Offsets inside the file: a truncated or forged file is refused before it is read."""
    try:
        ends = [row["data_offsets"][1] for name, row in table.items() if name != "__metadata__"]
        starts = [row["data_offsets"][0] for name, row in table.items() if name != "__metadata__"]
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"{path} is not a safetensors file.") from error
    if any(not isinstance(n, int) or n < 0 for n in starts + ends) or max(ends, default=0) != room:
        raise ArtifactError(f"{path} is truncated or damaged.")


def _parse(table: dict[str, Any], path: Path) -> dict[str, Any]:
    wrong = f"{path} is a safetensors file, but not a Tenuto artifact."
    try:
        header = json.loads(table["__metadata__"][KEY])
        version = str(header["format_version"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(wrong) from error
    if version.split(".")[0] != VERSION.split(".")[0]:
        raise ArtifactError(f"{path} has format version {version}; this Tenuto reads {VERSION}.")
    try:
        _ = str(header["family"]), str(header["model_class"]), dict(header["made"])
        _ = [float(t) for t in header["schedule"]["timesteps"]]
        _ = int(header["fingerprint"]["parameters"])
        _ = [float(v) for v in header["fingerprint"]["values"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(wrong) from error
    return header
