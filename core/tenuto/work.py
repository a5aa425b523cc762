"""Resumable long work: a folder with a manifest and one safetensors file per finished unit.

Everything is written beside its place and renamed, so that a kill leaves no half-written file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import TenutoError

log = logging.getLogger("tenuto")

FORMAT = 1
MANIFEST = "manifest.json"


def digest(value: Any) -> str:
    """A short stable hash of plain data."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    """Write a safetensors file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(dict(_apart(tensors)), part, metadata)
        part.chmod(0o644)  # it comes out readable by its owner alone
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _apart(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Contiguous tensors on the CPU that share no memory: the format knows no views."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        place = flat.untyped_storage().data_ptr()
        yield name, flat.clone() if place in seen else flat
        seen.add(place)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Work:
    """Finished units of one job. `path` None keeps them in memory only.

    `inputs` is plain data that says what the job is: another job's folder is started afresh.
    """

    def __init__(self, path: Path | str | None, inputs: dict[str, Any]) -> None:
        self.path = Path(path) if path is not None else None
        self._memory: dict[str, dict[str, Tensor]] = {}
        if self.path is None:
            return
        manifest = {"format": FORMAT, "inputs": digest(inputs)}
        try:
            found = _manifest(self.path)
            if found is None and any(_foreign(self.path)):
                raise TenutoError(f"{self.path} holds other files: name a folder for work alone.")
            if found != manifest:
                self.discard()
                text = json.dumps(manifest | {"about": inputs}, default=str)
                write_text(self.path / MANIFEST, text)
        except OSError as error:
            raise TenutoError(f"Cannot work in {self.path}: {error.strerror or error}.") from error

    def _file(self, unit: str) -> Path:
        assert self.path is not None
        return self.path / f"{quote(unit, safe='')}.safetensors"

    def load(self, unit: str) -> dict[str, Tensor] | None:
        """The tensors of a finished unit, or None where it is still to do."""
        if self.path is None:
            return self._memory.get(unit)
        try:
            return load_file(self._file(unit)) if self._file(unit).exists() else None
        except (SafetensorError, OSError):
            log.warning("%s is unreadable and is done again", self._file(unit))
            return None

    def save(self, unit: str, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors of a finished unit."""
        if self.path is None:
            self._memory[unit] = {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()}
        else:
            write_tensors(self._file(unit), tensors, None)

    def discard(self) -> None:
        """Remove what was kept, by this job or by one in a folder inside: the job is done."""
        self._memory.clear()
        if self.path is not None and (self.path / MANIFEST).exists():
            _remove(self.path)


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {key: data[key] for key in ("format", "inputs")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _foreign(folder: Path) -> Iterator[Path]:
    """What lies in `folder` and is no work: neither half-written nor another job's folder."""
    if folder.exists():
        yield from (p for p in folder.iterdir() if p.suffix != ".part" and not _manifest(p))


def _remove(folder: Path) -> None:
    """Units first and the manifest last: a kill in between leaves a folder that says what it is."""
    for path in sorted(folder.iterdir(), key=lambda p: p.name == MANIFEST):
        if path.is_dir() and _manifest(path):
            _remove(path)
        elif path.suffix in (".safetensors", ".part") or path.name == MANIFEST:
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
