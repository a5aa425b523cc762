"""The folder by which a checkpoint in a single file is used as a model; see `single_file`."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import ModelError
from ..files import write_text
from .libraries import imported, quiet_loading
from .single_file import (
    CODES,
    DENOISERS,
    MODELS,
    NOTE,
    SMALL,
    SingleFile,
    header,
    holds,
    hub_id,
    index_of,
    is_checkpoint,
    pointed,
)
from .single_file_reading import by_map
from .weight_files import INDEX, variant_of, weight_files

CONFIG = "scheduler/scheduler_config.json"
SPARED = {"text_encoder_3": "tokenizer_3"}  # the T5 of Stable Diffusion 3: it works without


def opened_folder(
    file: Path, out: Path, donors: Iterable[Path], unknown: str | None = None
) -> Path:
    """The folder, below `out`, by which `file` is used as a model; made where it is missing.

    donors: folders in diffusers format, of which one of the same kind gives the configurations:
    the model that diffusers takes the file for, if it is one of them. unknown: what to say where
    none fits. ModelError if the file has no denoiser, is quantized, or none of them fits.
    """
    if not is_checkpoint(file):
        raise ModelError(f"{file.name} has no denoiser: it is not the checkpoint of a model.")
    for name, (dtype, _) in header(file).items():
        if dtype in CODES and name.endswith("weight"):
            raise ModelError(
                f"{file.name} is already quantized ({dtype}): choose the one in 16 or 32 bits."
            )
    about = file.stat()
    sign = hashlib.sha256(f"{file} {about.st_mtime_ns} {about.st_size}".encode()).hexdigest()[:10]
    stem = re.sub(r"[^A-Za-z0-9]+", "-", file.stem).strip("-")[:60]
    folder = out / f"{stem}-{sign}"
    known = pointed(folder)
    if known is None or not known.rest.is_dir():
        lacking, seen = "", set[str]()
        for donor in _by_kind(file, donors):
            found = _fits(file, donor, seen)
            if isinstance(found, SingleFile):
                _write(found, folder)
                return folder
            lacking = found or lacking
        raise ModelError(lacking or unknown or _unknown(file))
    return folder


def _by_kind(file: Path, donors: Iterable[Path]) -> list[Path]:
    """`donors`, those first that have the name of the model that diffusers takes the file for.

    Models with equal denoisers may have other schedulers: SDXL and its few-step kinds.
    """
    name = (hub_id(file) or "").rpartition("/")[2]

    def other(donor: Path) -> bool:
        return not any(part.rpartition("--")[2] == name for part in donor.parts)

    return sorted(dict.fromkeys(donors), key=other)


def _unknown(file: Path) -> str:
    """Why a file is not opened, and what would help."""
    known = hub_id(file)
    if known is None:
        return (
            f"{file.name} is of a kind that diffusers does not open from a single file: the node "
            "Tenuto Calibrate in ComfyUI takes it."
        )
    return (
        f"{file.name} has weights alone, and no model of its kind is here to lend its configuration"
        f' and tokenizers: hf download {known} --include "*.json" "*.txt" "*.model" gets them.'
    )


def _fits(file: Path, donor: Path, seen: set[str]) -> SingleFile | str:
    """The note, if a model has the kind of denoiser that is in `file`; "" if it has another.

    Else a sentence on the part that is nowhere. seen: configurations that did not fit, of which
    many models share one.
    """
    try:
        _, parts = index_of(donor)
        name = next(name for name in parts if name in DENOISERS)
        config = f"{parts[name][1]} {(donor / name / 'config.json').read_text('utf-8')}"
    except Exception:  # of an index that is no such one
        return ""
    if config in seen:
        return ""
    seen.add(config)
    place = file, donor, name, parts[name][1]
    mapped = by_map(*place)
    own = mapped is not None and not mapped.renamed  # diffusers would find no name in it
    known = not own and _by_diffusers(*place)
    if mapped is None and not known:
        return ""
    variant = variant_of(donor)
    for part, (_, kind) in parts.items():
        encoder = part.startswith(MODELS) and part not in DENOISERS
        if encoder and not holds(file, part, kind) and not _there(donor / part, variant):
            if part in SPARED:
                continue
            seen.discard(config)  # another model of the kind may have it
            return (
                f"{file.name} has no {part.replace('_', ' ')}, and {donor.name}, a model of the "
                "same kind, has none here either: a whole folder of that kind would do."
            )
    return SingleFile(file, donor, mapped=not known)


def _by_diffusers(file: Path, donor: Path, name: str, kind: str) -> bool:
    """Whether diffusers makes the denoiser of `donor` of what is in `file`."""
    import torch

    try:
        meta = {n: torch.empty(shape, device="meta") for n, (_, shape) in header(file).items()}
        with quiet_loading():
            imported(kind).from_single_file(
                meta, config=str(donor), subfolder=name, local_files_only=True, device="meta"
            )
    except Exception:  # of a config or class that is not for this file
        return False
    return True


def _there(place: Path, variant: str | None) -> bool:
    """Whether the weights of a part are there, all files that an index names."""
    files = weight_files(place, variant)
    return bool(files) and all(file.is_file() for file in files)


def _write(single: SingleFile, folder: Path) -> None:
    """The folder, all at once: one that was left half written is never used."""
    donor = single.rest
    (index, parts), variant = index_of(donor), variant_of(donor)
    unchecked = {"safety_checker": [None, None], "requires_safety_checker": False}
    index |= {key: value for key, value in unchecked.items() if key in index}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".opening-") as aside:
        made = Path(aside) / "made"
        for part in SPARED.keys() & parts.keys():
            if not (holds(single.file, part, parts[part][1]) or _there(donor / part, variant)):
                index |= {key: [None, None] for key in (part, SPARED[part])}
        for name in parts:
            for small in sorted((donor / name).glob("*")) if (donor / name).is_dir() else ():
                if small.suffix in SMALL and ".index." not in small.name:
                    (made / name).mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(small, made / name / small.name)
        _predicts(single.file, made / CONFIG)
        write_text(made / INDEX, json.dumps(index, indent=1) + "\n")
        note = {"file": str(single.file), "rest": str(donor), "mapped": single.mapped}
        write_text(made / NOTE, json.dumps(note, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def _predicts(file: Path, config: Path) -> None:
    """Write into `config` what the weights predict, where `file` says so as ComfyUI reads it.

    Files of SDXL have an empty tensor "v_pred" where it is the velocity and not the noise, and
    "ztsnr" where runs begin at noise alone (Lin et al. 2024, arXiv 2305.08891): models that are
    else like SDXL, which lends them its scheduler's configuration.
    """
    if "v_pred" not in header(file) or not config.is_file():
        return
    facts = json.loads(config.read_text("utf-8")) | {"prediction_type": "v_prediction"}
    if "ztsnr" in header(file):
        facts |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    write_text(config, json.dumps(facts, indent=1) + "\n")
