"""A safetensors file that is written one tensor after the other: a model need not fit in memory.

Its header is known from types and shapes alone, so it is written first and every tensor goes to
its place as it is made. The layout is that of safetensors' own description: eight bytes with the
header's length, the header in JSON, the values without gaps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from ...files import bits_of

Spec = tuple[torch.dtype, tuple[int, ...]]  # type and shape of a tensor
DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
ALIGNED = 8  # bytes: where the values begin
PIECE = 2**24  # bytes read at a time


def bytes_of(spec: Spec) -> int:
    """The size of a tensor in a file."""
    dtype, shape = spec
    return torch.Size(shape).numel() * dtype.itemsize


class TensorsFile:
    """A file of tensors of known types and shapes, in which each is put once, in any order.

    As a context it closes, and raises ValueError where a tensor is missing. Wide values come first,
    so that each begins at a multiple of its size.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.specs, self.missing = dict(specs), set(specs)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._places: dict[str, int] = {}
        end = 0
        for name in sorted(specs, key=lambda name: (-specs[name][0].itemsize, name)):
            dtype, shape = specs[name]
            start, end = end, end + bytes_of(specs[name])
            facts = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            header[name], self._places[name] = facts, start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNED)
        self._start = 8 + len(text)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; ValueError if it is not of the type and shape that was said."""
        if (tensor.dtype, tuple(tensor.shape)) != self.specs[name] or name not in self.missing:
            raise ValueError(f"{name} is not the tensor that was to be written")
        self._file.seek(self._start + self._places[name])
        self._file.write(bits_of(tensor).numpy().data)
        self.missing.remove(name)

    def flush(self) -> None:
        """Let others read what was put."""
        self._file.flush()

    def __enter__(self) -> TensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self.missing:
            raise ValueError(f"{min(self.missing)} was not written")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            found.update(piece)
    return found.hexdigest()
