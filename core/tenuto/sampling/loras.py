"""LoRA files on a pipeline, by diffusers and PEFT: each in one sentence if it cannot be."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from torch import nn

from ..errors import ModelError
from ..model import denoisers_of
from ..text import first_line, printable
from .libraries import quiet_loading
from .model_folders import ENDING
from .single_file import header, is_lora


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
        if not is_lora(file):
            header(file)  # or it cannot be read
            raise ModelError(f"{file.name} is no LoRA: its tensors are others.")
        return found._replace(file=file)


def takes_loras(kind: type | None) -> TypeGuard[type]:
    """Whether pipelines of a class of diffusers load LoRAs."""
    return hasattr(kind, "load_lora_weights")


def check_takes_loras(kind: type) -> None:
    """ModelError if PEFT is missing, or pipelines of that class take no LoRA."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError("LoRAs need PEFT, which is not installed: pip install peft.")
    if not takes_loras(kind):
        raise ModelError(f"{kind.__name__} of diffusers takes no LoRA.")


def add_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Put LoRAs on a pipeline, together, each with its weight.

    Before or after an artifact is attached. ModelError if PEFT is missing, the pipeline takes none,
    or one is of another model; the pipeline may have some of them then, and a layer that such a
    file has widened.
    """
    if not loras:
        return
    check_takes_loras(type(pipe))
    names, sizes = [f"lora_{number}" for number in range(len(loras))], _sizes(pipe)
    for name, (file, _) in zip(names, loras, strict=True):
        with _fits(pipe, file):
            pipe.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=name,
                local_files_only=True, use_safetensors=True,
            )  # fmt: skip
        if not any(name in known for known in pipe.get_list_adapters().values()):
            raise _other(pipe, file, "it has no such layers")
        _check_sizes(pipe, file, sizes)
    pipe.set_adapters(names, [lora.weight for lora in loras])


@contextmanager
def with_loras(
    pipe: Any, loras: Sequence[Lora], on_changed: Callable[[], object]
) -> Iterator[None]:
    """LoRAs on a pipeline while it lasts, as `add_loras` puts them on, and then off again.

    An artifact is attached inside of it. on_changed is called where the pipeline has other
    parameters afterwards than before, and must be loaded anew: a Control LoRA of FLUX widens its
    first layer for good.
    """
    if not loras:
        yield
        return
    check_takes_loras(type(pipe))
    before = _parameters(pipe)
    try:
        add_loras(pipe, loras)
        yield
    finally:
        with suppress(Exception):  # what it leaves is seen
            pipe.unload_lora_weights()
        after = _parameters(pipe)
        if before.keys() != after.keys() or any(before[n] is not after[n] for n in before):
            on_changed()


def _sizes(pipe: Any) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of the denoisers, by name, with LoRAs or without."""
    return {
        f"{part}.{name}".replace(".base_layer", ""): (layer.in_features, layer.out_features)
        for part, denoiser in denoisers_of(pipe).items()
        for name, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _check_sizes(pipe: Any, file: Path, before: dict[str, tuple[int, int]]) -> None:
    """ModelError where a LoRA has changed the size of a layer, for which diffusers has no error.

    It widens any layer of FLUX that a file has wider, and a run fails. That is meant for the first
    layer alone, and for pipelines that feed it an image for control beside the latents.
    """
    now = _sizes(pipe)
    changed = [name for name, size in before.items() if now.get(name, size) != size]
    if not changed:
        return
    if not all(name.endswith(".x_embedder") for name in changed):
        raise _other(pipe, file, "the layers have other sizes")
    takes = inspect.signature(type(pipe).__call__).parameters
    if "control_image" not in takes or "controlnet" in pipe.components:
        wide, has = now[changed[0]][0], before[changed[0]][0]
        raise ModelError(
            f"{file.name} is a Control LoRA: it adds a control image to the input ({wide} channels "
            f"in place of {has}), and a {type(pipe).__name__} takes none. Choose another LoRA, or "
            "use it in diffusers with a FluxControlPipeline."
        )


def _parameters(pipe: Any) -> dict[str, Any]:
    """Those of all parts of a pipeline, and their buffers, by name."""
    return {
        f"{part}.{name}": value
        for part, module in pipe.components.items()
        if hasattr(module, "named_parameters")
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }


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
