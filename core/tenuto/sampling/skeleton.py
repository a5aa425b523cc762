"""A diffusers folder as a pipeline without weights: what can be asked of it before it is loaded.

Every model is built from its config.json on the meta device, which takes no memory and no more
than seconds whatever its size; sizes come from the headers of the safetensors files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import SHORT, ModelError
from .libraries import LIBRARIES, imported, quiet_loading
from .loading import check_model, class_of, folder_of
from .single_file import DENOISERS, MODELS, bytes_of, checked, pointed, size_of
from .weight_files import (
    CONFIG,
    complaints,
    parts_in,
    variant_of,
    weighed,
    weight_files,
)

BUILT = ("transformer", "unet", "text_encoder", "controlnet")  # parts whose names begin like this


@dataclass
class Skeleton:
    """A pipeline that cannot run.

    pipe: of the real class, with its scheduler and its models on the meta device. stored: bytes of
    weights that the folder has of every part. complaints: one sentence on each part that cannot be
    loaded as it lies there.
    """

    folder: Path
    pipe: Any
    stored: dict[str, int] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)


def skeleton(model: str) -> Skeleton | None:
    """The pipeline in a folder, or the demo model of that name, without its weights.

    None where only loading tells: a hub id, a pipeline that is not of diffusers, a denoiser that
    cannot be built like this. ModelError if the folder is none, or names what is not installed.
    """
    check_model(model)
    folder, kind = folder_of(model), class_of(model)
    if folder is None or kind is None:
        return None
    pipe: Any = object.__new__(kind)  # its __init__ reads configurations that nobody asks for
    found, variant = Skeleton(folder, pipe), variant_of(folder)
    single = checked(folder) if pointed(folder) else None
    for name, (library, cls) in parts_in(folder):
        place, ours = folder / name, library in LIBRARIES
        built = ours and name.startswith(BUILT)
        vars(pipe)[name] = None
        checks = single is None and weighed(name, (library, cls))
        wrong = list(complaints(place, variant)) if checks else []
        found.complaints += wrong
        if built and (place / CONFIG).is_file():
            vars(pipe)[name] = _model(place, library, cls)
            if name in DENOISERS and vars(pipe)[name] is None:
                return None
        elif name == "scheduler" and ours:
            vars(pipe)[name] = _scheduler(place, cls)
        if single is not None and name.startswith(MODELS):
            found.stored[name] = bytes_of(single, name, cls)
        elif not wrong and (place / CONFIG).is_file():
            _weigh(found, name, variant)
    return found


def scheduler_of(model: str) -> Any:
    """The scheduler of the pipeline in a folder, or of a demo model; None where none is there."""
    folder = folder_of(model)
    named = dict(parts_in(folder)).get("scheduler") if folder else None
    if folder is None or named is None or named[0] != "diffusers":
        return None
    return _scheduler(folder / "scheduler", named[1])


def denoisers_in(model: str) -> int:
    """How many denoisers the pipeline in a folder has; 0 where its parts are not known."""
    folder = folder_of(model)
    return 0 if folder is None else sum(n.startswith(DENOISERS) for n, _ in parts_in(folder))


def _class(library: str, name: str) -> Any:
    found = imported(name, library)
    if not isinstance(found, type):
        raise ModelError(f"This version of {library} has no {name}: a newer one may.")
    return found


def _scheduler(folder: Path, name: str) -> Any:
    """None where it cannot be made: what then is wrong, loading says."""
    with suppress(Exception):  # as each library has its own
        return _class("diffusers", name).from_pretrained(str(folder), local_files_only=True)
    return None


def _model(folder: Path, library: str, name: str) -> nn.Module | None:
    """The model that `folder` has the configuration of, on the meta device.

    Its parameters alone where its buffers are needed to make it; None where that fails too.
    """
    ways: list[Any] = [torch.device("meta")]
    with suppress(ImportError):  # a host may have none
        from accelerate import init_empty_weights

        ways.append(init_empty_weights())
    kind: Any = _class(library, name)
    for empty in ways:
        with warnings.catch_warnings(), quiet_loading(), suppress(Exception), empty:
            warnings.simplefilter("ignore")
            if library == "diffusers":
                made = kind.from_config(kind.load_config(str(folder), local_files_only=True))
            else:
                config = kind.config_class.from_pretrained(str(folder), local_files_only=True)
                made = kind(config)
            if isinstance(made, nn.Module):
                return made.eval()
    return None


def _weigh(found: Skeleton, name: str, variant: str | None) -> None:
    """Note the bytes of a part's weights, and what is wrong with its files."""
    folder = found.folder / name
    try:
        found.stored[name] = sum(size for _, size in _tensors(folder, variant))
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        found.complaints.append(f"The weights in {folder} cannot be read: {error}."[:SHORT])


def _tensors(folder: Path, variant: str | None) -> Iterator[tuple[str, int]]:
    """(name, bytes) of each tensor of the safetensors files that the loader would read."""
    for path in weight_files(folder, variant):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                count = 1
                for size in part.get_shape():
                    count *= size
                yield key, count * size_of(part.get_dtype())
