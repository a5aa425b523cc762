"""Models of the hub: the folder of a download, whole as it lies or made whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import ModelError
from .libraries import imported
from .model_folders import downloaded, hub_cache
from .weight_files import FIRST, complaints, parts_in, variant_of, weighed


def whole(folder: Path) -> bool:
    """Whether a pipeline's folder has the configurations and weights of all its models."""
    return not any(_missing(folder))


def _missing(folder: Path) -> Iterator[str]:
    variant = variant_of(folder)
    for name in (name for name, row in parts_in(folder) if weighed(name, row)):
        yield from complaints(folder / name, variant)


def whole_download(model: str) -> Path | None:
    """The folder of a hub id, if all of it was downloaded."""
    found = downloaded(hub_cache()).get(model)
    return Path(found) if found is not None and whole(Path(found)) else None


def download(model: str) -> Path:
    """The folder of a hub id, downloaded where it is not there: fp16 files where it has no others.

    ModelError where it is not whole and there is no network; what else diffusers and the hub raise
    is for the caller to put into a sentence.
    """
    known = whole_download(model)
    if known is not None:
        return known
    pipeline, missing = imported("DiffusionPipeline"), OSError()
    for variant in (None, *FIRST):
        try:
            found = Path(pipeline.download(model, use_safetensors=True, variant=variant))
        except OSError as error:  # no such weights; no such model, or no network, too
            missing = error if variant is None else missing
            continue
        for said in _missing(found):
            raise ModelError(f"The download of {model} is not whole: {said}")
        return found
    raise missing
