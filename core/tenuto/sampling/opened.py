"""MODEL as people have it: a single checkpoint file, a folder, a hub id, or a model that ships."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..resources import cache_folder
from ..text import first_line
from .downloads import whole_download
from .loading import HUB_ID, PREFIX, check_model, load
from .model_folders import ENDING, LENT, downloaded, hub_cache, lenders, models_in
from .single_file import hub_id
from .single_file_folder import opened_folder
from .weight_files import INDEX

OPENED = "opened"  # the folder of what opens single files


def opened(model: str | Path, config: str | Path | None = None) -> str:
    """What `load`, `skeleton` and `check_model` take for a model; ModelError if there is none.

    A single file is opened by a folder in the user's cache, made where it is missing; of a hub id
    that was downloaded it is the folder. config: for a single file, a model of its kind (a folder,
    a folder of models or a hub id) that has its configurations and tokenizers; else one is looked
    for on this machine. Only a hub id may use the network, and only where it was not downloaded.
    """
    path = Path(model).expanduser()
    if not str(model).startswith(PREFIX) and path.is_file():
        return str(_opened_file(path.resolve(), config))
    if config is not None:
        raise ModelError(f"--config is for a model in a single file, and {model} is none.")
    check_model(str(model))
    if str(model).startswith(PREFIX) or path.is_dir():
        return str(model)
    return str(whole_download(str(model)) or model)


def _opened_file(file: Path, config: str | Path | None) -> Path:
    if file.suffix.lower() != ENDING:
        raise ModelError(
            f"{file.name} is a file, and of files only .safetensors checkpoints are models: the "
            "node Tenuto Calibrate in ComfyUI takes what ComfyUI loads."
        )
    if (file.parent.parent / INDEX).is_file():
        raise ModelError(f"{file.name} is a part of {file.parent.parent}: name that folder.")
    place = cache_folder() / OPENED
    if config is None:
        return opened_folder(file, place, lenders(file), _unknown(file))
    mark = hashlib.sha256(str(config).encode()).hexdigest()[:10]
    named = _named(str(config))
    said = f"No model in {config} is of the kind of {file.name}"
    known = hub_id(file)
    said += "." if known is None else f": {known} is."
    return opened_folder(file, place / mark, named, said)


def _unknown(file: Path) -> str | None:
    """What to say where no model of a file's kind is here; None if no model would do."""
    known = hub_id(file)
    if known is None:
        return None
    return (
        f"{file.name} has weights alone, and no model of its kind is on this machine to lend its "
        f"configuration and tokenizers: add --config {known}, which downloads them (a few MB), or "
        "--config FOLDER, a model of that kind in diffusers format (Forge has them in "
        "backend/huggingface)."
    )


def _named(config: str) -> list[Path]:
    """The models that `config` names; ModelError if there are none."""
    folder = Path(config).expanduser()
    if folder.is_dir():
        found = [folder / name for name in models_in(folder.absolute(), 3, single=False)]
        if not found:
            raise ModelError(f"--config {config} has no model in diffusers format ({INDEX}).")
        return found
    if folder.exists() or not HUB_ID.fullmatch(config):
        raise ModelError(f"--config is a folder or a hub id, and {config} is none.")
    known = downloaded(hub_cache()).get(config)
    return [Path(known) if known else _configurations(config)]


def _configurations(model: str) -> Path:
    """The folder of a hub id with what a single file lacks, which is downloaded."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(LENT)))
    except Exception as error:  # the hub has many
        said = first_line(error, 200) or type(error).__name__
        raise ModelError(f"The hub does not give {model}: {said}") from error


def open_model(
    model: str | Path,
    *,
    config: str | Path | None = None,
    device: Any = None,
    dtype: Any = None,
) -> Any:
    """The diffusers pipeline of any model that the command takes as MODEL.

    model: a `.safetensors` checkpoint as ComfyUI and Forge have them, a folder in diffusers format,
    a hub id, or demo:NAME. config: for a checkpoint, a model of its kind (folder or hub id) whose
    configurations and tokenizers it is used with; left out, one on this machine. device: where to
    (the CPU). dtype: fp32 unless it is given. Only a hub id may use the network. Raises ModelError.
    """
    return load(opened(model, config), device, dtype)
