"""Where models are on this machine: below a folder, in the hub's cache, beside a single file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .single_file import DENOISERS, NOTE, is_checkpoint
from .weight_files import INDEX, variant_of, weight_files

ENDING = ".safetensors"
DEPTH = 4  # how far below a folder a model is looked for
MANY = 500  # models and folders beyond these are not listed
LENT = ("*.json", "*.txt", "*.model", "*.jinja")  # what a download has to lend a single file


def models_in(root: Path, depth: int = DEPTH, single: bool = True) -> list[str]:
    """Models below `root` by relative name: folders with a model_index.json, and single files.

    No link to a folder is followed. single: False for the folders alone.
    """
    found: list[str] = []
    for path, files in _folders(root, depth):
        if INDEX in files:
            if NOTE not in files:  # or it opens a single file, which is listed itself
                found.append(str(root) if path == root else path.relative_to(root).as_posix())
        elif single:
            names = [path / name for name in sorted(files) if name.endswith(ENDING)][:MANY]
            names = (file for file in names if inside(file, root) and is_checkpoint(file))
            found += [file.relative_to(root).as_posix() for file in names]
        if len(found) >= MANY:
            break
    return found


def loose_files(root: Path, depth: int = DEPTH, models: bool = False) -> Iterator[Path]:
    """All safetensors files below `root` that are not of a model's folder, unopened, by name.

    models: those beside a model_index.json too. No link to a folder is followed, and none to a
    file elsewhere.
    """
    for path, files in _folders(root, depth):
        if models or INDEX not in files:
            found = (path / name for name in sorted(files) if name.endswith(ENDING))
            yield from (file for file in found if not file.is_symlink() or inside(file, root))


def _folders(root: Path, depth: int) -> Iterator[tuple[Path, list[str]]]:
    """`root` and the folders below it with the names of their files; none inside a model's."""
    for seen, (folder, below, files) in enumerate(os.walk(root), 1):
        path = Path(folder)
        yield path, files
        if INDEX in files or len(path.relative_to(root).parts) >= depth:
            below.clear()
        below[:] = sorted(d for d in below if not d.startswith("."))
        if seen >= 20 * MANY:
            break


def inside(path: Path, folder: Path) -> bool:
    """Whether `path`, with links followed, lies in `folder`."""
    return path.resolve().is_relative_to(folder.resolve())


def hub_cache() -> Path | None:
    """Where the hub's own program keeps what it downloads."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return None
    return Path(HF_HUB_CACHE)


def downloaded(hub: Path | None) -> dict[str, str]:
    """Folders of the models that were downloaded from the hub, by their ids."""
    found = {}
    for folder in sorted(hub.glob("models--*--*")) if hub is not None and hub.is_dir() else ():
        try:
            commit = (folder / "refs" / "main").read_text("ascii").strip()
        except (OSError, ValueError):
            continue
        snapshot = folder / "snapshots" / commit
        if commit and (snapshot / INDEX).is_file():
            found["/".join(folder.name.split("--")[1:])] = str(snapshot)
    return found


def bare(folder: Path) -> bool:
    """Whether a model has the configuration of its denoiser alone, to lend to a single file."""
    parts = [folder / name for name in DENOISERS if (folder / name / "config.json").is_file()]
    variant = variant_of(folder)
    return bool(parts) and not any(weight_files(part, variant) for part in parts)


def lenders(file: Path) -> Iterator[Path]:
    """Models on this machine that may lend a single file what it lacks.

    Those in its folder, those that were downloaded from the hub, and those of the ComfyUI
    (models/diffusers) or Forge (backend/huggingface) whose file it is.
    """
    place = file.resolve().parent
    yield from (place / name for name in models_in(place, 2, single=False))
    yield from (Path(folder) for folder in downloaded(hub_cache()).values())
    for above in place.parents:
        for known in (above / "diffusers", above / "backend" / "huggingface"):
            if known.is_dir():
                yield from (known / name for name in models_in(known, 2, single=False))
