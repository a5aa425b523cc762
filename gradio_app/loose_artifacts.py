"""Artifacts below the folders of models, by their headers alone, and for which models they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path

from tenuto.artifact import read_header
from tenuto.errors import TenutoError
from tenuto.sampling.loading import PREFIX, demo_folder
from tenuto.sampling.model_folders import inside, loose_files
from tenuto.sampling.single_file import DENOISERS, SingleFile, header, values_of
from tenuto.sampling.weight_files import parts_in, variant_of, weight_files

NEAR = 0.05  # how far the values of two models of a size may be from each other: some have buffers
Made = tuple[str, int]  # the class that an artifact was made for, and how many parameters it has


def below(roots: Iterable[Path], out: Path) -> dict[str, Path]:
    """All artifacts by their path below a root; what lies in `out`, the app's folder, is left."""
    found = dict[str, Path]()
    for root in roots:
        for file in loose_files(root, models=True):
            name = file.relative_to(root).as_posix()
            if name.isprintable() and made_for(file) and not inside(file, out):
                found.setdefault(name, file)
    return found


def fitting(files: Mapping[str, Path], place: str | None) -> list[str]:
    """Names of those that may be of a model. place: its folder or single file, demo:NAME, or None.

    By class and size: whether the weights are the same is seen when one is used.
    """
    made = {name: made_for(file) for name, file in files.items()} if place else {}
    model = _parts(str(place)) if made else {}
    return sorted(
        name for name, kind in made.items()
        if kind and any(own in ("", kind[0]) and _near(size, kind[1]) for own, size in model)
    )  # fmt: skip


def made_for(file: Path) -> Made | None:
    """What an artifact was made for; None where the file is none."""
    try:
        about = file.stat()
        return _made_for(file, about.st_mtime_ns, about.st_size)
    except OSError:
        return None


@lru_cache(8192)
def _made_for(file: Path, *_: int) -> Made | None:
    """Remembered while the file is as it is: folders have many."""
    try:
        found = read_header(file)
        return str(found["model_class"]), int(found["fingerprint"]["parameters"])
    except (TenutoError, LookupError, TypeError, ValueError):
        return None


def _near(one: int, other: int) -> bool:
    """Whether two models are of one size; 0 is unknown."""
    return not one or abs(one - other) <= NEAR * max(one, other)


def _parts(place: str) -> list[Made]:
    """(class, values) of the parts of a model; a single file does not say its class: it is ""."""
    path = Path(demo_folder(place)) if place.startswith(PREFIX) else Path(place)
    if path.is_file():
        return [("", values_of(SingleFile(path, path.parent), DENOISERS[0], ""))]
    return [(kind, _values(path, name)) for name, (_, kind) in parts_in(path)]


def _values(folder: Path, name: str) -> int:
    """How many values the weights of a part have; 0 where it cannot be read."""
    try:
        files = weight_files(folder / name, variant_of(folder))
        return sum(prod(shape) for file in files for _, shape in header(file).values())
    except (TenutoError, OSError):
        return 0
