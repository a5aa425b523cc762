"""Marks of a pipeline's text encoders, loaded or in its folder: whose states some states are.

A mark is a hash over a few values of every weight, without names, in the type that they compute
in: an encoder has the same one in memory and, not loaded, in its files. What is put into it (LoRA,
quantized layers) changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..files import bits_of
from ..model import Replacement, Weights, denoiser_of, device_and_dtype, encoders_of
from ..model.parts import ENCODER
from .loading import HUB_ID, folder_of
from .low_memory import Shards

COLUMNS = 8  # values looked at in the first, middle and last row of a weight


def encoder_mark(pipe: Any) -> str | None:
    """The mark of a pipeline's text encoders; of its folder's where it has none loaded.

    None where there are neither.
    """
    loaded = encoders_of(pipe)
    if not loaded:
        return folder_mark(pipe)
    return _joined({name: _of_module(encoder) for name, encoder in loaded.items()})


def folder_mark(pipe: Any) -> str | None:
    """The mark of the text encoders in a pipeline's folder, in the type of its denoiser.

    None where it has no folder, or no text encoder is in it. Of a hub id it is the folder that was
    downloaded; of several (revisions) none, unless all have the same encoders.
    """
    folder = folder_of(pipe)
    folders = _snapshots(getattr(pipe, "name_or_path", None)) if folder is None else [folder]
    dtype = device_and_dtype(denoiser_of(pipe))[1]
    marks = {_of_folder(place, pipe, dtype) for place in folders}
    return marks.pop() if len(marks) == 1 else None


def _snapshots(name: Any) -> list[Path]:
    """The folders of a hub id that are on this machine: one for each revision."""
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        return []
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name
    except ImportError:
        return []
    there = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    return sorted(path for path in there.glob("*") if (path / "model_index.json").is_file())


def _of_folder(folder: Path, pipe: Any, dtype: torch.dtype) -> str | None:
    """The mark of the encoders in one folder; without those whose tokenizer was left out."""
    places = [p for p in sorted(folder.iterdir()) if ENCODER.fullmatch(p.name)]
    beside = {p: p.name.replace("text_encoder", "tokenizer") for p in places}
    wanted = [p for p in places if vars(pipe).get(beside[p], beside) is not None]
    return _joined({p.name: _of_files(p, dtype) for p in wanted}) if wanted else None


def codes_mark(tensors: Mapping[str, Tensor]) -> str:
    """The mark of tensors by name, such as the codes that an artifact has of text encoders."""
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(name.encode() + (probe(x) if x.numel() else b""))
    return found.hexdigest()


def _joined(marks: dict[str, str]) -> str:
    text = "\n".join(f"{name} {mark}" for name, mark in sorted(marks.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _of_module(encoder: nn.Module) -> str:
    """Of a loaded encoder, with whatever is in it now; what is offloaded is read.

    A class may keep some weights in fp32: they count in the type of the others, as of the files.
    """
    read, known, dtype = Weights(encoder), list(encoder.parameters()), device_and_dtype(encoder)[1]
    found = {probe(read(p), dtype) for p in known if p.is_floating_point() and p.numel()}
    for module in encoder.modules():
        if isinstance(module, Replacement):
            scheme = str(getattr(module, "scheme", type(module).__name__))
            codes = (b for b in module.buffers() if b.numel())
            found.add(hashlib.sha256(scheme.encode()).digest())
            found |= {probe(b) for b in codes}
        scaling = getattr(module, "scaling", None)  # of PEFT's layers
        if isinstance(scaling, dict):
            facts = scaling, getattr(module, "active_adapters", None), _off(module)
            found.add(hashlib.sha256(repr(facts).encode()).digest())
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()


def _off(module: Any) -> bool:
    """Whether the adapters of a layer are off."""
    return bool(getattr(module, "disable_adapters", False))


def _of_files(folder: Path, dtype: torch.dtype) -> str:
    """Of the weights in a folder, as a loader gives them in `dtype`."""
    found = set(_file_probes(folder, dtype))
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()


def _file_probes(folder: Path, dtype: torch.dtype) -> Iterator[bytes]:
    for name, path in Shards(folder, dtype).files.items():
        with safe_open(path, "pt") as file:
            part = file.get_slice(name)
            shape = list(part.get_shape())
            if part.get_dtype()[0] not in "FB" or part.get_dtype() == "BOOL" or 0 in shape:
                continue
            if not shape:
                yield _mark(shape, file.get_tensor(name).reshape(1).to(dtype))
                continue
            rows = [part[i : i + 1].reshape(-1)[:COLUMNS] for i in _places(shape[0])]
            yield _mark(shape, torch.cat(rows).to(dtype))


def probe(x: Tensor, dtype: torch.dtype | None = None) -> bytes:
    """A few values of a tensor in three of its rows, in `dtype` or its own."""
    flat = x.detach()
    rows = (
        [flat[i].reshape(-1)[:COLUMNS] for i in _places(len(flat))] if flat.ndim else [flat[None]]
    )
    return _mark(list(x.shape), torch.cat(rows).to(dtype or x.dtype))


def _places(count: int) -> tuple[int, int, int]:
    return 0, count // 2, count - 1


def _mark(shape: list[int], values: Tensor) -> bytes:
    text = f"{shape} {values.dtype}".encode() + bits_of(values).numpy().tobytes()
    return hashlib.sha256(text).digest()
