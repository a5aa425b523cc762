"""Interrupted work goes on: a folder with a manifest and one safetensors file per finished unit.

Every file is written whole or not at all: a kill leaves none that is half written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import TenutoError
from .files import bits_of, remove_part, write_tensors, write_text
from .lock import Lock

log = logging.getLogger("tenuto")

FORMAT = 1
MANIFEST = "manifest.json"


def digest(value: Any) -> str:
    """A short stable hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Work:
    """Finished units of one job. `path` None keeps them in memory only.

    `inputs` is plain data that says what the job is: another job's folder is started afresh, and a
    unit of another job, or one that is not what was written, is done again. While the object lives
    no other process can work in the folder (TenutoError).
    """

    def __init__(self, path: Path | str | None, inputs: dict[str, Any]) -> None:
        self.path = Path(path) if path is not None else None
        self._memory: dict[str, dict[str, Tensor]] = {}
        if self.path is None:
            return
        self.job = digest(inputs)
        manifest = {"format": FORMAT, "inputs": self.job}
        try:
            found = _manifest(self.path)
            if found is None and any(_foreign(self.path)):
                raise TenutoError(f"{self.path} holds other files: name a folder for work alone.")
            lock = Lock(self.path)
            self._release = weakref.finalize(self, lock.release)
            found = _manifest(self.path)
            if found != manifest:
                if found is not None:
                    _remove(self.path, whole=False)
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
            return self._read(unit) if self._file(unit).exists() else None
        except (SafetensorError, OSError, ValueError):
            log.warning("%s is unreadable and is done again", self._file(unit))
            return None

    def part(self, unit: str, start: str) -> dict[str, Tensor]:
        """Of a unit that was loaded or saved the tensors whose names begin with `start`.

        The file is not checked again. TenutoError if it cannot be read.
        """
        if self.path is None:
            return {k: v for k, v in self._memory[unit].items() if k.startswith(start)}
        try:
            with safe_open(self._file(unit), "pt") as opened:
                names = [name for name in opened.keys() if name.startswith(start)]  # noqa: SIM118
                return {name: opened.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise TenutoError(f"Cannot read {self._file(unit)} any more: {error}.") from error

    def save(self, unit: str, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors of a finished unit."""
        if self.path is None:
            self._memory[unit] = {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()}
        else:
            try:
                write_tensors(self._file(unit), tensors, self._about(unit, tensors))
            except OSError as error:
                said = error.strerror or error
                raise TenutoError(f"Cannot write {self._file(unit)}: {said}.") from error

    def _about(self, unit: str, tensors: dict[str, Tensor]) -> dict[str, str]:
        """What a unit's file says of itself: whose it is, which, and a hash of all in it."""
        return {"job": self.job, "unit": unit, "content": _content(tensors)}

    def _read(self, unit: str) -> dict[str, Tensor]:
        """The tensors of a unit; ValueError if its file is another one's, or not as written."""
        with safe_open(self._file(unit), "pt") as opened:
            about = opened.metadata() or {}
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if about != self._about(unit, found):
            raise ValueError(f"{self._file(unit)} is another unit")
        return found

    def discard(self) -> None:
        """Remove what was kept, by this job or by one in a folder inside: the job is done."""
        self._memory.clear()
        if self.path is None:
            return
        try:
            if (self.path / MANIFEST).exists():
                _remove(self.path)
        except OSError as error:
            raise TenutoError(f"Cannot clear {self.path}: {error.strerror or error}.") from error
        finally:
            self._release()


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


def _content(tensors: dict[str, Tensor]) -> str:
    """A hash of names, types, shapes and every byte."""
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)};".encode())
        found.update(bits_of(x).numpy().data)
    return found.hexdigest()


def _remove(folder: Path, whole: bool = True) -> None:
    """Units first and the manifest last: a kill in between leaves a folder that says what it is.

    A folder in the place of a unit is somebody else's, and stays. whole: the folder too, where
    nothing else is in it and it is no link.
    """
    for path in sorted(folder.iterdir(), key=lambda p: p.name == MANIFEST):
        if path.suffix == ".part":
            remove_part(path)
        elif path.is_dir() and not path.is_symlink():
            if _manifest(path):
                _remove(path)
        elif path.suffix == ".safetensors" or path.name == MANIFEST:
            path.unlink()
    if whole and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
