"""The text in a PNG, read without decoding its pixels: no image is too large to be refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from tenuto.errors import TenutoError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = 2**26  # of the largest image; 8192 x 8192
BUDGET = 2**20  # bytes of all texts that are kept, unpacked
CHUNKS = 100_000
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
KEPT = ("parameters", "tenuto")  # what the app writes; all other texts are left unread
NAME = 80  # bytes of a text's name and the zero after it


def texts(path: Path) -> dict[str, str]:
    """The text fields in `KEPT` of a PNG by name; TenutoError, in one sentence, where it is none.

    No more than `BUDGET` bytes are unpacked, however many texts there are.
    """
    try:
        with path.open("rb") as file:
            if file.read(8) != SIGNATURE:
                raise TenutoError("This file is not a PNG.")
            return _texts(file, path.stat().st_size)
    except OSError as error:
        raise TenutoError(f"Cannot read the image: {error.strerror or error}.") from error


def _texts(file: BinaryIO, size: int) -> dict[str, str]:
    found: dict[str, str] = {}
    left = BUDGET
    for number in range(CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise TenutoError("This PNG is cut off.")
        length, kind = struct.unpack(">I4s", head)
        end = file.tell() + length
        if end > size:
            raise TenutoError("This PNG is cut off.")
        if number == 0:
            _check_size(kind, file.read(length))
        elif kind == b"IEND":
            return found
        elif kind in TEXTS:
            name, _, rest = file.read(min(length, NAME)).partition(b"\0")
            word = name.decode("latin-1")
            if word in KEPT and word not in found:
                if length > left:
                    raise TenutoError("A text in this PNG is too long.")
                raw = _text(kind, rest + file.read(end - file.tell()), left)
                found[word] = raw.decode("utf-8" if kind == b"iTXt" else "latin-1", "replace")
                left -= len(raw)
        file.seek(end + 4)  # past the checksum
    raise TenutoError("This PNG has too many parts.")


def _check_size(kind: bytes, data: bytes) -> None:
    if kind != b"IHDR" or len(data) != 13:
        raise TenutoError("This file is not a PNG.")
    width, height = struct.unpack(">II", data[:8])
    if not 0 < width * height <= PIXELS:
        raise TenutoError(f"An image of {width} x {height} pixels is too large.")


def _text(kind: bytes, rest: bytes, left: int) -> bytes:
    """The value of a text chunk, from what follows its name; at most `left` bytes."""
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # language, translated name
    elif packed:
        rest = rest[1:]
    return _unpacked(rest, left) if packed else rest


def _unpacked(data: bytes, left: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(data, left + 1)
    except zlib.error as error:
        raise TenutoError("A text in this PNG is damaged.") from error
    if len(found) > left:
        raise TenutoError("A text in this PNG is too long.")
    return found
