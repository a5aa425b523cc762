"""The container GGUF, version 3: written one tensor after the other, and read.

Little-endian: "GGUF", the version, the number of tensors and of key-values; each key-value; of each
tensor its name, its sizes from the innermost to the outermost, its type and its offset; then the
values, each tensor at a multiple of 32 bytes. (ggml's docs/gguf.md.)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ...errors import ArtifactError
from ...files import bits_of

MAGIC, VERSION, ALIGNED = b"GGUF", 3, 32
UINT32, INT32, STRING, ARRAY = 4, 5, 8, 9  # types of values
TYPES = {  # of tensors that we write: weights and bytes of a block
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
}  # fmt: skip
MOST = 2**20  # entries or characters: more is no file of ours
Value = int | str | list[int]


@dataclass(frozen=True)
class Entry:
    """One tensor. shape: as torch has it. type: of ggml. bytes: its size. offset: of its values."""

    name: str
    shape: tuple[int, ...]
    type: int
    bytes: int
    offset: int = 0


class GgufWriter:
    """A file of tensors that are known but for their values; each is put once, in any order."""

    def __init__(self, path: Path, values: Mapping[str, Value], entries: list[Entry]) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        head = MAGIC + struct.pack("<IQQ", VERSION, len(entries), len(values))
        head += b"".join(_text(key) + _value(value) for key, value in values.items())
        offset = 0
        for entry in entries:
            sizes = entry.shape[::-1]
            head += _text(entry.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
            head += struct.pack("<IQ", entry.type, offset)
            self._places[entry.name] = offset, entry.bytes
            offset += entry.bytes + (-entry.bytes % ALIGNED)
        head += b"\0" * (-len(head) % ALIGNED)
        self._start = len(head)
        self._file: BinaryIO = path.open("wb")
        self._file.write(head)
        self._file.truncate(self._start + offset)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write the values of one tensor; ValueError if it has another size."""
        offset, size = self._places.pop(name)
        found = bits_of(tensor).numpy()
        if found.nbytes != size:
            raise ValueError(f"{name} has {found.nbytes} bytes, not {size}")
        self._file.seek(self._start + offset)
        self._file.write(found.data)

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._file.close()
        if kind is None and self._places:
            raise ValueError(f"{min(self._places)} was not written")


def _text(text: str) -> bytes:
    found = text.encode()
    return struct.pack("<Q", len(found)) + found


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)


def read_gguf(path: Path) -> tuple[dict[str, Value], dict[str, Entry]]:
    """(values, tensors) of a file as `GgufWriter` writes it; offsets are from its beginning.

    ArtifactError where it is damaged.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path.stat().st_size)
    except (struct.error, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is not a GGUF file, or it is truncated or damaged.") from error
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror or error}.") from error


def _read(file: BinaryIO, size: int) -> tuple[dict[str, Value], dict[str, Entry]]:
    def take(form: str) -> Any:
        found = struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))
        return found[0] if len(found) == 1 else found

    def text() -> str:
        length = take("Q")
        if length > 64 * MOST:
            raise ValueError("no such text")
        return file.read(length).decode()

    def value() -> Value:
        kind = take("I")
        if kind == STRING:
            return text()
        if kind == UINT32:
            return take("I")
        inner, count = take("IQ")
        if kind != ARRAY or inner != INT32 or count > MOST:
            raise ValueError("no such value")
        return list(struct.unpack(f"<{count}i", file.read(4 * count)))

    if file.read(4) != MAGIC or take("I") != VERSION:
        raise ValueError("another file")
    tensors, pairs = take("QQ")
    if max(tensors, pairs) > MOST:
        raise ValueError("no such file")
    values = {text(): value() for _ in range(pairs)}
    found: list[Entry] = []
    for _ in range(tensors):
        name, count = text(), take("I")
        if not 0 < count <= 4:
            raise ValueError("a tensor has one to four dimensions")
        sizes = struct.unpack(f"<{count}Q", file.read(8 * count))
        kind, offset = take("IQ")
        block, width = TYPES[kind]
        found.append(Entry(name, sizes[::-1], kind, prod(sizes) // block * width, offset))
    start = file.tell() + (-file.tell() % ALIGNED)
    entries = {e.name: replace(e, offset=start + e.offset) for e in found}
    if any(entry.offset + entry.bytes > size for entry in entries.values()):
        raise ValueError("it ends before its tensors do")
    return values, entries
