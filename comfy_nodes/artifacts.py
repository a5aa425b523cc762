"""What Load Tenuto Artifact offers: models/tenuto, and exported models that bring a schedule.

`tenuto export` and Tenuto Export write models that the host loads by itself; their cache schedule
and forecast lie in the file, or beside it, and are applied like those of an artifact.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths

from tenuto.artifact import Artifact
from tenuto.artifact.export import COMPANION, applicable, exported_facts, read_exported
from tenuto.errors import TenutoError
from tenuto.text import printable

from .files import NO_FILE, choices, stamp

FOLDER, WRITTEN = "tenuto", "diffusion_models"  # below models/; the latter in output/ too
MODELS = (WRITTEN, "checkpoints")  # where exported models are looked for
KIND = f"models/{FOLDER}"
SAID = " [exported: "  # what follows the name of an exported model in the list


def names() -> list[str]:
    """The files of models/tenuto, and exported models of others with what they bring."""
    ours = folder_paths.get_filename_list(FOLDER)
    return choices([*(_labelled(FOLDER, name, name) for name in ours), *_exported()])


def _exported() -> Iterator[str]:
    for models in MODELS:
        known = folder_paths.get_filename_list(models)
        beside = (  # GGUF files have no header of ours, and are not in the host's own list
            path.relative_to(folder).as_posix().removesuffix(COMPANION)
            for folder in map(Path, folder_paths.get_folder_paths(models))
            for path in sorted(folder.rglob(f"*.gguf{COMPANION}"))
        )
        for name in dict.fromkeys((*known, *beside)):
            found = _labelled(models, name, f"{models}/{name}")
            if SAID in found:
                yield found


def _labelled(folder: str, name: str, shown: str) -> str:
    """`shown`, with what an exported model brings where it is one that brings something."""
    path = folder_paths.get_full_path(folder, name)
    if path is None or not Path(path).is_file():
        return shown
    brings = _brings(path, *stamp(path))
    return f"{shown}{SAID}{', '.join(brings)}]" if brings else shown


@lru_cache(maxsize=1024)
def _brings(path: str, size: int, time: int) -> tuple[str, ...]:
    """What of an exported model can be applied; none of any other file."""
    return tuple(applicable(exported_facts(path) or {}))


def path_of(name: str) -> str | None:
    """The file that the list calls `name`; None where there is none, or a name leads out."""
    plain = name.partition(SAID)[0]
    ours = folder_paths.get_full_path(FOLDER, plain)
    models, _, inner = plain.partition("/")
    if ours is None and models in MODELS:
        ours = folder_paths.get_full_path(models, inner)
    return ours if ours is not None and Path(ours).is_file() else None


def missing(name: str) -> str:
    """One sentence on a file that is not there."""
    if name == NO_FILE:
        return f"There is no file in {KIND} yet: Tenuto Calibrate or `tenuto quantize` makes one."
    return f"There is no artifact called {printable(name)} in {KIND}."


def loaded(name: str) -> tuple[Artifact, list[str]]:
    """(the artifact, what to say of an exported file first); TenutoError in one sentence."""
    path = path_of(name)
    if path is None:
        raise TenutoError(missing(name))
    if exported_facts(path) is None:
        found = Artifact.load(path)
        found.validate(name)
        return found, []
    facts, found = read_exported(path)
    return found, [about(facts)]


def about(facts: dict[str, Any]) -> str:
    """What an exported file is, in one line."""
    layers = facts.get("layers")
    kinds = layers.items() if isinstance(layers, dict) else ()
    said = ", ".join(f"{count} layers in {kind}" for kind, count in kinds)
    host = f", for {facts['host']}" if facts.get("host") else ""
    return printable(f"exported as {facts.get('format')}{host}: {said or 'weights'}", 400)
