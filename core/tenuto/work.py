"""Resumable long work: a folder with a manifest and one safetensors file per finished unit.

Everything is written beside its place and renamed, so that a kill leaves no half-written file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import TenutoError
from .lock import Lock

log = logging.getLogger("tenuto")

FORMAT = 1
MANIFEST = "manifest.json"


def digest(value: Any) -> str:
    """A short stable hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: renamed to it in the end, removed after an error.

    The folder is made where there is none. OSError where it cannot be, or where nothing was
    written. A killed process leaves `.NAME.PID.part` behind, which `Work` takes for no file.
    """
    path = _target(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def clear_parts(path: Path) -> None:
    """Remove what killed processes left half written of `path`: for the only job that writes it."""
    target = path.resolve() if path.is_symlink() else path
    for part in target.parent.glob(f".{escape(target.name)}.*.part"):
        with suppress(OSError):  # another user's
            _remove_part(part)


def _remove_part(part: Path) -> None:
    """A half-written file, or the folder of one."""
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    """Write a safetensors file whole or not at all; OSError, of a full disk too."""
    with whole_file(path) as part, _folder_beside(part) as folder:
        try:
            save_file(dict(_apart(tensors)), folder / path.name, metadata)
        except SafetensorError as error:
            raise _of_system(error) from error
        (folder / path.name).replace(part)
        part.chmod(0o644)  # it comes out readable by its owner alone


@contextmanager
def _folder_beside(part: Path) -> Iterator[Path]:
    """A folder of its own for a library that writes beside its file, which a kill leaves there."""
    folder = part.with_name(f"{part.stem}.folder{part.suffix}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _of_system(error: SafetensorError) -> OSError:
    """What the system said, which safetensors has in its words alone."""
    number = re.search(r"os error (\d+)", str(error))
    code = None if number is None else int(number[1])
    return OSError(str(error)) if code is None else OSError(code, os.strerror(code))


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
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _target(path: Path) -> Path:
    """Where `path` leads to: a link is followed, not replaced. Its folder is made."""
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


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


def bits_of(x: Tensor) -> Tensor:
    """The bytes of a tensor, row by row, as uint8 (n,) on the CPU."""
    flat = x.detach().cpu().contiguous()  # of one value it may keep a stride that `view` refuses
    return flat.as_strided((x.numel(),), (1,)).view(torch.uint8)


def _remove(folder: Path, whole: bool = True) -> None:
    """Units first and the manifest last: a kill in between leaves a folder that says what it is.

    A folder in the place of a unit is somebody else's, and stays. whole: the folder too, where
    nothing else is in it and it is no link.
    """
    for path in sorted(folder.iterdir(), key=lambda p: p.name == MANIFEST):
        if path.suffix == ".part":
            _remove_part(path)
        elif path.is_dir() and not path.is_symlink():
            if _manifest(path):
                _remove(path)
        elif path.suffix == ".safetensors" or path.name == MANIFEST:
            path.unlink()
    if whole and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
