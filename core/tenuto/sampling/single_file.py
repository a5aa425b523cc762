"""A checkpoint in a single file, as ComfyUI and the WebUIs have it, beside a folder that opens it.

Such a file has weights alone. What else a pipeline of diffusers needs, configurations, tokenizers
and a scheduler, comes from a folder of a model of the same kind: `single_file_folder.opened_folder`
copies that (a few MB) into a folder of its own with a note of where the weights lie, and that
folder can be used as a model everywhere. The file is read by diffusers' `from_single_file`, and
never copied or written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..text import printable
from .libraries import library
from .weight_files import INDEX, parts_in, variant_of, weight_files

NOTE = "tenuto-single-file.json"  # in the folder that opens a file
SMALL = (".json", ".txt", ".model", ".jinja")  # what is copied of a part
DENOISERS = ("transformer", "unet")
MODELS = (*DENOISERS, "vae", "text_encoder", "image_encoder")  # how parts with weights are called
CODES = ("I8", "U8", "F8_E4M3", "F8_E5M2", "I32")  # types of weights that are quantized
MARKS = (  # how names in a denoiser begin, in a file of its own or among other parts
    "model.diffusion_model.", "input_blocks.0.", "double_blocks.0.", "joint_blocks.0.",
    "transformer_blocks.0.", "blocks.0.self_attn.", "layers.0.attention.",
)  # fmt: skip
OTHERS = re.compile(r"lora_|\.lora|control_model\.|controlnet|motion_modules")  # no whole model's
OF_LORAS = ("lora", "loha", "lokr", "hada_", ".alpha", "dora_scale")  # in names of their tensors
PLACES = {  # how names of a part begin
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (
        "cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.",
    ),
    "text_encoder_2": (
        "conditioner.embedders.1.", "conditioner.embedders.0.model.", "text_encoders.clip_g.",
    ),
}  # fmt: skip
T5 = ("text_encoders.t5xxl.",)


def size_of(dtype: str) -> int:
    """Bytes of one value of a type as safetensors writes it: F32, BF16, F8_E4M3, I8, BOOL."""
    bits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return max(1, int(bits or 8) // 8)


@dataclass(frozen=True)
class SingleFile:
    """What a note says. file: the checkpoint; rest: a folder with the parts that it lacks.

    mapped: whether its denoiser is read by Tenuto's key map, where diffusers cannot.
    """

    file: Path
    rest: Path
    mapped: bool = False


def pointed(folder: Path) -> SingleFile | None:
    """What the note in `folder` says; None where it has none. ModelError if it is damaged."""
    note = folder / NOTE
    if not note.is_file():
        return None
    try:
        facts = json.loads(note.read_text("utf-8"))
        return SingleFile(Path(facts["file"]), Path(facts["rest"]), facts.get("mapped") is True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{note} is not readable: {error}.") from error


# --- what is in a file ----------------------------------------------------------------------------


def header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(type as safetensors has it, shape) of each tensor by name; ModelError if it is no such file.

    Remembered while the file is as it is.
    """
    try:
        about = file.stat()
        return _header(file, about.st_mtime_ns, about.st_size)
    except Exception as error:  # the reader of safetensors has several
        said = printable(str(error), 100)
        raise ModelError(f"{file.name} is no safetensors file that can be read: {said}.") from error


@lru_cache(256)
def _header(file: Path, *_: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {n: (part.get_dtype(), tuple(part.get_shape())) for n, part in slices.items()}


def is_checkpoint(file: Path) -> bool:
    """Whether a file has a denoiser, as its header says; False where it cannot be read."""
    return _kind(file) == "checkpoint"


def is_lora(file: Path) -> bool:
    """Whether a file has a LoRA and no denoiser, as its header says; False if it is unreadable."""
    return _kind(file) == "lora"


def _kind(file: Path) -> str:
    try:
        about = file.stat()
        return _kind_by_names(file, about.st_mtime_ns, about.st_size)
    except Exception:  # the reader of safetensors has several
        return ""


@lru_cache(8192)
def _kind_by_names(file: Path, *_: int) -> str:
    """What it is, by names alone, remembered: folders have many files."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    if any(n.startswith(MARKS) for n in names) and not any(OTHERS.search(n) for n in names):
        return "checkpoint"
    return "lora" if any(mark in name for name in names for mark in OF_LORAS) else ""


def hub_id(file: Path) -> str | None:
    """The hub's id of the model whose kind diffusers takes the file for; None: it does not know."""
    import torch

    names = header(file)
    meta = {name: torch.empty(shape, device="meta") for name, (_, shape) in names.items()}
    utils = library("diffusers.loaders.single_file_utils")
    try:
        kind = utils.infer_diffusers_model_type(meta)
        found = utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    except Exception:  # as its versions have them
        return None
    unsure = kind == "v1" and not any("input_blocks." in name for name in names)
    return None if unsure else str(found)


def bytes_of(single: SingleFile, name: str, kind: str) -> int:
    """Bytes of a part's weights, in the file or in the folder that has the rest.

    name, kind: of the part, and of its class.
    """
    return sum(prod(shape) * size_of(dtype) for dtype, shape in _tensors(single, name, kind))


def values_of(single: SingleFile, name: str, kind: str) -> int:
    """How many values a part's weights have; as `bytes_of`."""
    return sum(prod(shape) for _, shape in _tensors(single, name, kind))


def _tensors(single: SingleFile, name: str, kind: str) -> list[tuple[str, tuple[int, ...]]]:
    known = header(single.file)
    if name.startswith(DENOISERS):
        others = ("model_ema.", *T5, *(start for starts in PLACES.values() for start in starts))
        known = {n: fact for n, fact in known.items() if not n.startswith(others)}
    elif holds(single.file, name, kind):
        known = {n: fact for n, fact in known.items() if n.startswith(places_of(name, kind))}
    else:
        files = weight_files(single.rest / name, variant_of(single.rest))
        known = {n: fact for file in files for n, fact in header(file).items()}
    return list(known.values())


def places_of(name: str, kind: str) -> tuple[str, ...]:
    """How names of a part begin in a file; nothing where it would not be in one."""
    return T5 if kind.startswith("T5") else PLACES.get(name, ())


def holds(file: Path, name: str, kind: str) -> bool:
    """Whether a file has weights of a part. name, kind: of the part, and of its class."""
    places = places_of(name, kind)
    return bool(places) and any(n.startswith(places) for n in header(file))


def index_of(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """The index of a model, and (library, class) of each of its parts."""
    index = json.loads((folder / INDEX).read_text("utf-8"))
    return index, {name: row for name, row in parts_in(folder) if name != "safety_checker"}


def checked(folder: Path) -> SingleFile:
    """What the note says, of a file that is still there; ModelError otherwise."""
    single = pointed(folder)
    if single is None or not single.file.is_file():
        name = folder.name if single is None else single.file
        raise ModelError(f"There is no checkpoint {name} any more.")
    return single
