"""Which files of a diffusers folder hold the weights of a part, and what is missing there.

A download may have the files of a variant alone, such as `diffusion_pytorch_model.fp16.safetensors`
(and `model.safetensors.index.fp16.json` where they are several), of all parts or of some.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .libraries import LIBRARIES

CONFIG, INDEX = "config.json", "model_index.json"
STEMS = ("diffusion_pytorch_model", "model")
WITH_WEIGHTS = ("transformer", "unet", "text_encoder", "controlnet", "vae")  # begin like this
PLAIN = [f"{stem}.safetensors{end}" for stem in STEMS for end in ("", ".index.json")]
FIRST = ("fp16", "bf16")  # of several variants
_ONE = re.compile(r"(?:diffusion_pytorch_model|model)\.(\w+)\.safetensors")
_SEVERAL = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index\.(\w+)\.json")


def rows_of(folder: Path) -> dict[str, Any]:
    """What model_index.json says of each part: name -> its row; ModelError if it cannot be read."""
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        return {name: row for name, row in index.items() if isinstance(row, list)}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} is not readable: {error}.") from error


def parts_in(folder: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """(name, (library, class)) of every part that model_index.json says there is."""
    for name, row in rows_of(folder).items():
        if len(row) == 2 and all(isinstance(part, str) for part in row) and name.isidentifier():
            yield name, (row[0], row[1])


def left_out(folder: Path) -> set[str]:
    """The parts that a pipeline was saved without, such as the T5 of Stable Diffusion 3."""
    return {name for name, row in rows_of(folder).items() if row and not any(row)}


def variant_of(folder: Path) -> str | None:
    """The variant that a pipeline's folder is to be read as; None where no part needs one.

    That is, where each has files without a variant, or those without share none.
    """
    needed: set[str] | None = None
    parts = parts_in(folder) if (folder / INDEX).is_file() else ()
    for place in (folder / name for name, _ in parts):
        if not any((place / name).is_file() for name in PLAIN):
            there = variants_in(place)
            if there:
                needed = there if needed is None else needed & there
    return _first(needed or set())


def variant_alone(place: Path) -> str | None:
    """The variant that one part is to be read as; None where it has files without one."""
    plain = any((place / name).is_file() for name in PLAIN)
    return None if plain else _first(variants_in(place))


def _first(variants: set[str]) -> str | None:
    usual = [name for name in FIRST if name in variants]
    return next(iter(usual or sorted(variants)), None)


def variants_in(place: Path) -> set[str]:
    """The variants that the folder of one part has in safetensors."""
    names = [path.name for path in place.iterdir()] if place.is_dir() else []
    found = (_ONE.fullmatch(name) or _SEVERAL.fullmatch(name) for name in names)
    return {match[1] for match in found if match}


def weight_files(place: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of one part: of the variant if it has that, else those without one.

    Those that an index names, else the one file; none where there is neither.
    """
    if variant is not None and variant in variants_in(place):
        index = (f"{stem}.safetensors.index.{variant}.json" for stem in STEMS)
        single = (f"{stem}.{variant}.safetensors" for stem in STEMS)
        return _named(place, index, single)
    return _plain(place)


def _plain(place: Path) -> list[Path]:
    index = (f"{stem}.safetensors.index.json" for stem in STEMS)
    return _named(place, index, (f"{stem}.safetensors" for stem in STEMS))


def _named(place: Path, indices: Iterator[str], names: Iterator[str]) -> list[Path]:
    for index in (place / name for name in indices):
        if index.is_file():
            known = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            return sorted(place / Path(name).name for name in known)
    return [place / name for name in names if (place / name).is_file()][:1]


def as_it_lies(
    folder: Path, pipeline: type | None, given: set[str]
) -> tuple[dict[str, None], dict[str, str]]:
    """What `from_pretrained` is to be told of a pipeline's folder: parts that are None, options.

    diffusers refuses a pipeline without a part that is no optional one, even if it saved it so:
    Stable Diffusion 3 without its T5. given: the parts that do not come from the folder.
    ModelError with the first thing that keeps it from being loaded.
    """
    variant = variant_of(folder)
    for name, row in parts_in(folder):
        if weighed(name, row) and name not in given:
            for sentence in complaints(folder / name, variant):
                raise ModelError(sentence)
    absent = left_out(folder) - set(getattr(pipeline, "_optional_components", ()))
    return dict.fromkeys(absent if pipeline else ()), {"variant": variant} if variant else {}


def weighed(name: str, row: tuple[str, str]) -> bool:
    """Whether a part of a pipeline is a model with weights; row: its library and class."""
    return row[0] in LIBRARIES and name.startswith(WITH_WEIGHTS)


def complaints(place: Path, variant: str | None) -> Iterator[str]:
    """A sentence on what is missing in the folder of a part that is a model."""
    if not (place / CONFIG).is_file():
        yield f"{place} has no {CONFIG}: the model's folder is incomplete."
        return
    try:
        files = weight_files(place, variant)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # loading says what is wrong with an index
    if not files:
        yield f"{place} has no weights in safetensors, and nothing else is read."
    missing = [file for file in files if not file.is_file()]
    if missing:
        yield f"{missing[0]} is missing: the model's folder is incomplete."
