"""LoRA files on a pipeline, by diffusers and PEFT: each in one sentence if it cannot be."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ModelError
from ..text import first_line, printable
from .libraries import quiet_loading
from .model_folders import ENDING
from .single_file import header, is_checkpoint

MARKS = ("lora", "loha", "lokr", "hada_", ".alpha", "dora_scale")  # of names in such files


class Lora(NamedTuple):
    """A file, and how strongly it is used: 1 as it was trained."""

    file: Path
    weight: float = 1.0

    @classmethod
    def read(cls, text: str) -> Lora:
        """FILE or FILE:WEIGHT; ModelError if there is no such file, or it is no LoRA."""
        name, sign, end = text.rpartition(":")
        try:
            found = cls(Path(name), float(end)) if sign and name else cls(Path(text))
        except ValueError:  # C:\\loras\\x.safetensors
            found = cls(Path(text))
        file = found.file.expanduser()
        if not math.isfinite(found.weight):
            raise ModelError(f"The weight of a LoRA is a number, and {text} has none.")
        if not file.is_file():
            raise ModelError(f"There is no LoRA file {found.file}.")
        if file.suffix.lower() != ENDING:
            raise ModelError(f"{file.name} is no {ENDING} file, and no other LoRA is read.")
        if is_checkpoint(file) or not any(m in n for n in header(file) for m in MARKS):
            raise ModelError(f"{file.name} is no LoRA: its tensors are others.")
        return found._replace(file=file)


def add_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Put LoRAs on a pipeline, together, each with its weight.

    Before or after an artifact is attached. ModelError if PEFT is missing, the pipeline takes none,
    or one is of another model; the pipeline may have some of them then.
    """
    if not loras:
        return
    if importlib.util.find_spec("peft") is None:
        raise ModelError("LoRAs need PEFT, which is not installed: pip install peft.")
    if not hasattr(pipe, "load_lora_weights"):
        raise ModelError(f"{type(pipe).__name__} of diffusers takes no LoRA.")
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, (file, _) in zip(names, loras, strict=True):
        with _fits(pipe, file):
            pipe.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=name,
                local_files_only=True, use_safetensors=True,
            )  # fmt: skip
        if not any(name in known for known in pipe.get_list_adapters().values()):
            raise _other(pipe, file, "it has no such layers")
    pipe.set_adapters(names, [lora.weight for lora in loras])


@contextmanager
def _fits(pipe: Any, file: Path) -> Iterator[None]:
    """Whatever the loaders raise becomes one sentence; their own are kept back."""
    logger, level = logging.getLogger("diffusers"), logging.getLogger("diffusers").level
    logger.setLevel(logging.CRITICAL)
    try:
        with quiet_loading():
            yield
    except Exception as error:  # diffusers, PEFT and torch each have their own
        sizes = "the layers have other sizes" if "size mismatch" in str(error) else ""
        raise _other(pipe, file, sizes or f"diffusers says: {first_line(error, 120)}") from error
    finally:
        logger.setLevel(level)


def _other(pipe: Any, file: Path, why: str) -> ModelError:
    said = f"{file.name} is no LoRA of this {type(pipe).__name__}, or none that diffusers reads"
    return ModelError(f"{said}: {printable(why).rstrip('.')}.")
