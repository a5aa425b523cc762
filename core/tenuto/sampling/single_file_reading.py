"""Reads a checkpoint in a single file, by the folder that opens it; see `single_file`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .libraries import imported, typed
from .low_memory import empty_model, left_on_disk, placed, wide_of
from .mapped_file import MappedFile
from .single_file import DENOISERS, MODELS, SingleFile, checked, holds, index_of
from .weight_files import left_out, variant_of


def read_file(
    folder: Path,
    device: Any = None,
    dtype: Any = None,
    given: Mapping[str, Any] | None = None,
    *,
    low_memory: bool = False,
) -> Any:
    """The pipeline of a folder that opens a file, in `dtype`, fp32 where it is None.

    given: parts that are loaded already, by name, or None for what is left out. low_memory: the
    denoiser stays on disk, and a block is read when it is called. What diffusers raises is for the
    caller to put into a sentence.
    """
    place = torch.device("cpu" if device is None else device)
    apart = dict(given or {})
    low = denoisers_on_disk(folder, dtype, place) if low_memory else {}
    pipe = _whole(folder, dtype, apart | {n: part for n, part in low.items() if n not in apart})
    for name, part in pipe.components.items():
        if name not in apart and hasattr(part, "tie_weights"):
            part.tie_weights()  # the words of a T5: files may have them once
    check_filled({n: p for n, p in pipe.components.items() if n not in low}, checked(folder).file)
    return placed(pipe, place, *low)


def _whole(folder: Path, dtype: Any, apart: dict[str, Any]) -> Any:
    """The pipeline with what is there already, by name, and all else read."""
    single, (index, parts) = checked(folder), index_of(folder)
    kind: Any = imported(str(index["_class_name"]))
    optional = getattr(kind, "_optional_components", ())
    apart = dict.fromkeys(left_out(folder) - set(optional)) | apart
    local, variant = _local(dtype), {"variant": variant_of(single.rest)}
    models = {n: p for n, p in parts.items() if n.startswith(MODELS) and n not in apart}
    for name, (owner, cls) in models.items():
        if not name.startswith(DENOISERS) and not holds(single.file, name, cls):
            place = str(single.rest / name)
            kept: Any = {"use_safetensors": True, **variant, **local}
            apart[name] = imported(cls, owner).from_pretrained(place, **kept)
    names = {n: cls for n, (_, cls) in models.items() if n not in apart}
    if single.mapped:
        apart |= {n: _mapped(single, folder, n, c, dtype) for n, c in _denoisers(names)}
    if all(name in apart for name in models if name.startswith("text_encoder")):
        apart |= _from_file(single, folder, names, apart, local)
        pipe = kind.from_pretrained(str(folder), use_safetensors=True, **apart, **local)
    else:
        pipe = kind.from_single_file(str(single.file), config=str(folder), **apart, **local)
        pipe.register_to_config(_name_or_path=str(folder))
    return pipe


def read_denoisers(folder: Path) -> dict[str, Any]:
    """The denoiser of such a folder alone, in fp32, by its name in the pipeline.

    It stays on disk where Tenuto knows its names in files.
    """
    single, (_, parts) = checked(folder), index_of(folder)
    try:
        return denoisers_on_disk(folder, torch.float32, torch.device("cpu"))
    except ModelError:  # diffusers knows them
        names = {name: cls for name, (_, cls) in parts.items()}
        found = _from_file(single, folder, dict(_denoisers(names)), {}, _local(None))
        check_filled(found, single.file)
        return found


def denoisers_on_disk(folder: Path, dtype: Any, device: Any) -> dict[str, Any]:
    """The same, in `dtype`, left on disk: a block is read when it is called.

    ModelError where Tenuto has no key map for it.
    """
    single, (_, parts) = checked(folder), index_of(folder)
    found = {}
    for name, cls in _denoisers({name: cls for name, (_, cls) in parts.items()}):
        model, weights = _by_map(single, folder, name, cls, dtype)
        found[name] = left_on_disk(model, weights, device)
    return found


def by_map(file: Path, donor: Path, name: str, cls: str) -> MappedFile | None:
    """The denoiser of `donor` in `file` by its key map; None where that does not find all of it."""
    try:
        return _by_map(SingleFile(file, donor), donor, name, cls, torch.float32)[1]
    except Exception:  # of a config or class that is not for this file
        return None


def _by_map(
    single: SingleFile, folder: Path, name: str, cls: str, dtype: Any
) -> tuple[nn.Module, MappedFile]:
    kind, dtype = imported(cls), dtype or torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a class of diffusers is made of
        model = empty_model(kind, folder / name, dtype)
    return model, MappedFile(single.file, model, dtype, wide_of(kind))


def _mapped(single: SingleFile, folder: Path, name: str, cls: str, dtype: Any) -> Any:
    """A denoiser in memory, read by its key map."""
    model, weights = _by_map(single, folder, name, cls, dtype)
    model.load_state_dict(model.state_dict() | weights.whole(), assign=True)
    return model.eval()


def _denoisers(names: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, cls) for name, cls in names.items() if name.startswith(DENOISERS)]


def _local(dtype: Any) -> dict[str, Any]:
    return {**typed(dtype), "local_files_only": True}


def _from_file(
    single: SingleFile, folder: Path, names: Mapping[str, str], apart: Mapping[str, Any], local: Any
) -> dict[str, Any]:
    """Parts whose classes read a single file by themselves. apart: what is there already."""
    return {
        name: imported(cls).from_single_file(
            str(single.file), config=str(folder), subfolder=name, **local
        )
        for name, cls in names.items()
        if name not in apart
    }


def check_filled(parts: Mapping[str, Any], file: Path) -> None:
    """ModelError where a part got no value for some of its weights: the file lacks them."""
    for name, part in parts.items():
        parameters = getattr(part, "named_parameters", dict)
        for weight, value in dict(parameters()).items():
            if value.is_meta:
                raise ModelError(f"{file.name} has no {weight} of the {name.replace('_', ' ')}.")
