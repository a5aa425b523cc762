"""The text in a PNG, read without decoding its pixels: no image is too large to be refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from tenuto.errors import TenutoError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = 2**26  # of the largest image; 8192 x 8192
TEXT = 2**18  # bytes of a text field, unpacked
CHUNKS = 100_000
TEXTS = (b"tEXt", b"zTXt", b"iTXt")


def texts(path: Path) -> dict[str, str]:
    """The text fields of a PNG by name; TenutoError, in one sentence, where it is none."""
    try:
        with path.open("rb") as file:
            if file.read(8) != SIGNATURE:
                raise TenutoError("This file is not a PNG.")
            return _texts(file, path.stat().st_size)
    except OSError as error:
        raise TenutoError(f"Cannot read the image: {error.strerror or error}.") from error


def _texts(file, size: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for number in range(CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise TenutoError("This PNG is cut off.")
        length, kind = struct.unpack(">I4s", head)
        if length > size - file.tell():
            raise TenutoError("This PNG is cut off.")
        if number == 0:
            _check_size(kind, file.read(length))
        elif kind == b"IEND":
            return found
        elif kind in TEXTS:
            if length > TEXT:
                raise TenutoError("A text in this PNG is too long.")
            name, text = _text(kind, file.read(length))
            found.setdefault(name, text)
        else:
            file.seek(length, 1)
        file.seek(4, 1)  # the checksum
    raise TenutoError("This PNG has too many parts.")


def _check_size(kind: bytes, data: bytes) -> None:
    if kind != b"IHDR" or len(data) != 13:
        raise TenutoError("This file is not a PNG.")
    width, height = struct.unpack(">II", data[:8])
    if not 0 < width * height <= PIXELS:
        raise TenutoError(f"An image of {width} x {height} pixels is too large.")


def _text(kind: bytes, data: bytes) -> tuple[str, str]:
    """Name and value of a text chunk."""
    name, _, rest = data.partition(b"\0")
    packed, coding = kind == b"zTXt", "latin-1"
    if kind == b"iTXt":
        packed, coding = rest[:1] == b"\1", "utf-8"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # language, translated name
    elif packed:
        rest = rest[1:]
    return name.decode("latin-1"), (_unpacked(rest) if packed else rest).decode(coding, "replace")


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(data, TEXT)
    except zlib.error as error:
        raise TenutoError("A text in this PNG is damaged.") from error
    if unpacker.unconsumed_tail:
        raise TenutoError("A text in this PNG is too long.")
    return found
