"""Artifacts that a user can choose: built-in ones, the files of one folder, exported models.

An exported model (`tenuto export`) brings a cache schedule and a forecast, which are applied to it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from tenuto.artifact import Artifact, read_header
from tenuto.artifact.export import applicable, exported_facts, read_exported
from tenuto.errors import ArtifactError, TenutoError
from tenuto.model import families

from .choices import BUILT_IN, OFF
from .options import option

BUILT_INS = {  # what "From artifact" stands for in each; their route is a rule
    f"{BUILT_IN}Quality": OFF, f"{BUILT_IN}Balanced": "W8A8", f"{BUILT_IN}Fast": "W8A8",
}  # fmt: skip
Stamp = tuple[str, int, int]  # path, size, time of a file
MODELS = ("Stable-diffusion", "diffusion_models")  # below models/, where exported ones lie too
SAID = " [exported: "  # what follows the name of an exported model in the list


@dataclass(frozen=True)
class Found:
    """A file: its name in the list, and what its header says. brings: of an exported model."""

    name: str
    path: Path
    header: dict[str, Any]
    brings: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        """What its layers are quantized to, as the field Precision says it; Off where none is."""
        names = {facts["scheme"] for facts in self.header.get("layers", {}).values()}
        low = [n.partition("-")[0].upper() for n in sorted(names, key=lambda n: (n[1:2], n))]
        return low[0] if low else OFF


def folder() -> Path:
    """The folder of the settings page, or models/tenuto."""
    chosen = str(option("folder") or "").strip()
    if chosen:
        return Path(chosen).expanduser()
    from modules import paths

    return Path(paths.models_path) / "tenuto"


def files(denoiser: nn.Module | None = None) -> list[Found]:
    """The artifacts in the folder, in order, then exported models with something to apply.

    Those for the architecture of `denoiser` alone.
    """
    found = []
    for place, prefix in places():
        for path in sorted(place.rglob("*.safetensors")) if place.is_dir() else ():
            name = prefix + path.relative_to(place).as_posix()
            one = _found(path, name, exported=bool(prefix))
            if one is not None and (denoiser is None or _fits(one.header, denoiser)):
                found.append(one)
    return found


def places() -> list[tuple[Path, str]]:
    """(folder, what names begin with): that of artifacts first, then those of models."""
    from modules import paths

    below = Path(paths.models_path)
    return [(folder(), ""), *((below / name, f"{name}/") for name in MODELS)]


def _found(path: Path, name: str, exported: bool) -> Found | None:
    """The artifact in a file, or the exported model; None where it is some other file."""
    try:
        stamp = _stamp(path)
        brings = _brings(stamp)
        if brings:
            said = f"{name}{SAID}{' + '.join(brings)}]"
            return Found(said, path, _loaded_exported(stamp).header, brings)
        return None if exported else Found(name, path, _header(stamp))
    except (TenutoError, OSError):
        return None


def names(denoiser: nn.Module | None = None) -> list[str]:
    """What the field Artifact offers."""
    return [*BUILT_INS, *(found.name for found in files(denoiser))]


def find(name: str) -> Found | None:
    """The file called `name`; None for a built-in one. ArtifactError where there is none."""
    if name in BUILT_INS:
        return None
    plain = name.partition(SAID)[0]
    found = next((f for f in files() if f.name.partition(SAID)[0] == plain), None)
    if found is None:
        raise ArtifactError(f"There is no artifact called {name!r} in the folder of artifacts.")
    return found


def scheme_of(name: str) -> str:
    """What "From artifact" stands for."""
    found = find(name)
    return BUILT_INS[name] if found is None else found.scheme


def mark(found: Found | None) -> str | None:
    """8 hex digits of the file's SHA-256; of an exported model, that of what it says of itself."""
    if found is None:
        return None
    if found.brings:  # a whole model takes long to read
        text = json.dumps(found.header, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]
    return _digest(_stamp(found.path))[:8]


def load(found: Found) -> Artifact:
    """The artifact, read once as long as the file is the same."""
    return _loaded(_stamp(found.path))


def key(found: Found | None) -> Stamp | None:
    """Tells one state of a file from another."""
    return None if found is None else _stamp(found.path)


def _fits(header: dict[str, Any], denoiser: nn.Module) -> bool:
    try:
        keys = families.key_map_of(denoiser)
        wanted = keys.model_class if keys is not None else type(denoiser).__name__
    except TenutoError:
        return False
    return header["model_class"] == wanted


def _stamp(path: Path) -> Stamp:
    facts = path.stat()
    return str(path), facts.st_size, facts.st_mtime_ns


@lru_cache(maxsize=256)
def _header(stamp: Stamp) -> dict[str, Any]:
    return read_header(stamp[0])


@lru_cache(maxsize=1024)
def _brings(stamp: Stamp) -> tuple[str, ...]:
    return tuple(applicable(exported_facts(stamp[0]) or {}))


@lru_cache(maxsize=64)
def _loaded_exported(stamp: Stamp) -> Artifact:
    return read_exported(stamp[0])[1]


@lru_cache(maxsize=1)
def _loaded(stamp: Stamp) -> Artifact:
    return _loaded_exported(stamp) if _brings(stamp) else Artifact.load(stamp[0])


@lru_cache(maxsize=64)
def _digest(stamp: Stamp) -> str:
    digest = hashlib.sha256()
    with Path(stamp[0]).open("rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
