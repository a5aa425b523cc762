"""Files that are written whole or not at all: text, tensors, or anything that takes a path.

Each is written beside its place and renamed, so that a kill leaves no half-written file.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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
            remove_part(part)


def remove_part(part: Path) -> None:
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


def bits_of(x: Tensor) -> Tensor:
    """The bytes of a tensor, row by row, as uint8 (n,) on the CPU."""
    flat = x.detach().cpu().contiguous()  # of one value it may keep a stride that `view` refuses
    return flat.as_strided((x.numel(),), (1,)).view(torch.uint8)


def stamp(path: Path) -> tuple[int, ...] | None:
    """Which file this is, and of when; None where there is none."""
    try:
        s = path.stat()
    except OSError:
        return None
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns
