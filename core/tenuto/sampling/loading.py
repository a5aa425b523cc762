"""The models and prompts that ship, and how any diffusers pipeline is loaded."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ..errors import ModelError, TenutoError
from ..resources import asset
from ..resources import prompts as shipped_prompts
from ..text import first_line
from .downloads import download
from .libraries import import_parts, imported, quiet_loading, typed
from .processes import processes
from .single_file import pointed
from .weight_files import INDEX, as_it_lies

log = logging.getLogger("tenuto")

PREFIX = "demo:"
LISTS = ("default", "evaluation", "general", "captions")
OWNER = "demo-transformer"  # its autoencoder is that of every demo model
SINGLE = (
    "a model is a diffusers folder, a hub id or demo:NAME here; tenuto.open_model opens a "
    "checkpoint in a single .safetensors file."
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Defaults(NamedTuple):
    """How a model is sampled unless told otherwise; guidance None is the pipeline's own."""

    steps: int = 20
    guidance: float | None = None

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Defaults:
        """From plain data; what is not given stays as it is here. ValueError if it cannot be."""
        steps, guidance = int(facts.get("steps", cls().steps)), facts.get("guidance")
        found = cls(steps, None if guidance is None else float(guidance))
        if steps < 1 or not math.isfinite(found.guidance or 0):
            raise ValueError(f"{steps} steps at guidance {guidance}")
        return found


def demo(model: str = "transformer", *, device: Any = None, dtype: Any = None) -> Any:
    """The shipped text-to-image model as a diffusers pipeline, in fp32 on the CPU by default.

    model: "transformer" or "unet". It comes from the installed files alone: no network. Call the
    transformer with `use_resolution_binning=False, clean_caption=False`: PixArt's pipeline does
    not know so small an image. Raises ModelError if no such model ships.
    """
    return _read(demo_folder(model), device, dtype, local=True)


def demo_folder(model: str) -> Path:
    """The diffusers folder of a shipped model: "transformer", or "demo:transformer"."""
    name = model.removeprefix(PREFIX)
    there = _shipped_models()
    if name not in there:
        choice = (
            f"choose one of {', '.join(there)}" if there else "none came with this installation"
        )
        raise ModelError(f"There is no demo model {name!r}: {choice}.")
    return asset(f"demo-{name}")


def _shipped_models() -> list[str]:
    names = []
    for name in ("transformer", "unet"):
        try:
            if (asset(f"demo-{name}") / INDEX).is_file():
                names.append(name)
        except TenutoError:
            continue
    return names


def prompts(name: str = "default") -> list[str]:
    """A shipped list of prompts: "default" (calibration), "evaluation", or "general" (any model).

    "captions" are longer, for text encoders that are calibrated by themselves.
    "default" and "evaluation" name what the demo models know, and share no class.
    """
    if name not in LISTS:
        raise TenutoError(f"There is no prompt list {name!r}: choose one of {', '.join(LISTS)}.")
    return list(shipped_prompts(name))


def defaults(model: Any) -> Defaults:
    """Steps and guidance of a model, by name, folder or pipeline, as its `tenuto.json` has them."""
    folder = folder_of(model)
    try:
        facts = json.loads((folder / "tenuto.json").read_text(encoding="utf-8")) if folder else {}
        return Defaults.read(facts)
    except FileNotFoundError:
        return Defaults()
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{folder}/tenuto.json is not readable: {error}.") from error


def folder_of(model: Any) -> Path | None:
    """The folder of a model, by name, folder or pipeline; None where it has none."""
    if not isinstance(model, str | Path):
        model = getattr(model, "name_or_path", None) or ""
    if str(model).startswith(PREFIX):
        return demo_folder(str(model))
    folder = Path(str(model)).expanduser()
    return folder if str(model) and folder.is_dir() else None


def check_model(model: str) -> None:
    """Raise ModelError unless `model` can be one: checked before anything heavy is imported.

    model: `demo:NAME`, a diffusers folder, or a hub id such as "org/name".
    """
    if model.startswith(PREFIX):
        demo_folder(model)
        return
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / INDEX).is_file():
            part = (path.parent / INDEX).is_file()
            said = f"it is a part of {path.parent}: name that" if part else f"it has no {INDEX}"
            raise ModelError(f"{model} is not a diffusers folder: {said}.")
    elif path.exists():
        raise ModelError(f"{model} is a file; {SINGLE}")
    elif not HUB_ID.fullmatch(model):
        raise ModelError(f"There is no folder {model}, and no hub id is written like that.")


def class_of(model: str) -> type | None:
    """The class of diffusers that loading such a model gives; None where only loading tells."""
    folder = folder_of(model)
    try:
        facts = json.loads((folder / INDEX).read_text("utf-8")) if folder else {}
        name = str(facts.get("_class_name"))
    except (OSError, ValueError, AttributeError):
        return None
    found = imported(name)
    return found if isinstance(found, type) else None


def encoder_names(model: str) -> tuple[str, ...]:
    """The text encoders of a model by what its pipeline calls them; a hub id is downloaded."""
    folder = folder_of(model) or _downloaded(model)
    try:
        facts = json.loads((folder / INDEX).read_text("utf-8"))
        return tuple(n for n, row in facts.items() if n.startswith("text_encoder") and any(row))
    except (OSError, ValueError, TypeError, AttributeError):
        return ()


def load(
    model: str,
    device: Any = None,
    dtype: Any = None,
    *,
    low_memory: bool | None = False,
    encoders: bool = True,
    parts: Mapping[str, Any] | None = None,
) -> Any:
    """A diffusers pipeline: `demo:NAME`, a diffusers folder or a hub id.

    dtype: fp32 unless it is given. low_memory: the denoiser stays on disk, and a block is read when
    it is called, which `record` and `quantize` can do with; None: where the model is large for the
    memory that is free. encoders: large text encoders too then. parts: loaded already, by name, or
    None for what is left out. Safetensors alone are read, and only a hub id may use the network.
    Raises ModelError.
    """
    check_model(model)
    path = demo_folder(model) if model.startswith(PREFIX) else Path(model).expanduser()
    local = path.is_dir()
    if local and pointed(path):
        from .single_file_reading import read_file

        low = _is_too_large(path, dtype) if low_memory is None and parts is None else low_memory
        with _one_sentence(path, local), quiet_loading():
            return read_file(path, device, dtype, parts, low_memory=bool(low))
    if parts is not None:
        return _read(path if local else _downloaded(model), device, dtype, True, given=parts)
    if low_memory is not False:
        folder = path if local else _downloaded(model)
        if low_memory or _is_too_large(folder, dtype):
            return _read(folder, device, dtype, True, encoders=encoders)
    return _read(path if local else _downloaded(model), device, dtype, True)


def load_denoisers(model: str) -> Any:
    """The denoisers of a pipeline alone, in fp32, as attributes; their weights stay on disk.

    A weight is read when `model.Weights` is asked for it. ModelError as of `load`, and where the
    folder holds an already quantized denoiser.
    """
    import torch

    check_model(model)
    path = demo_folder(model) if model.startswith(PREFIX) else Path(model).expanduser()
    folder = path if path.is_dir() else _downloaded(model)
    with _one_sentence(folder, local=True), quiet_loading():
        from .low_memory import check_in_float, parts_on_disk

        if pointed(folder):
            from .single_file_reading import read_denoisers

            return SimpleNamespace(**read_denoisers(folder))
        check_in_float(folder)
        import_parts(folder)
        found = parts_on_disk(folder, torch.device("cpu"), torch.float32, encoders=False)
    if not found:
        raise ModelError(f"{model} has no denoiser in safetensors files.")
    return SimpleNamespace(**found)


def on_disk(pipe: Any) -> bool:
    """Whether weights of a pipeline's denoiser are read when a block is called."""
    from ..model import denoiser_of

    return any(parameter.is_meta for parameter in denoiser_of(pipe).parameters())


def _is_too_large(folder: Path, dtype: Any) -> bool:
    """`is_too_large`, and a word in the log if so."""
    import torch

    from .low_memory import is_too_large

    found = processes().once(lambda: is_too_large(folder, dtype or torch.float32))
    if found:
        log.warning("The model is large for the memory that is free: it is read block by block.")
    return found


def _downloaded(model: str) -> Path:
    """The folder to which the hub's files of a model go; no network where they are there."""
    with _one_sentence(model, local=False):
        return download(model)


def _read(
    source: str | Path,
    device: Any,
    dtype: Any,
    local: bool,
    encoders: bool | None = None,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """`source` as a pipeline. encoders: if it is to stay on disk, whether they are."""
    import torch

    from .low_memory import parts_on_disk, placed

    with _one_sentence(source, local), quiet_loading():
        import_parts(Path(source))
    kind = typed(dtype) | {"use_safetensors": True, "local_files_only": local}
    place = torch.device("cpu" if device is None else device)
    apart: dict[str, Any] = {}
    with _one_sentence(source, local), quiet_loading():
        if encoders is not None:
            apart = parts_on_disk(Path(source), place, dtype or torch.float32, encoders)
        known = _shared(source, kind) | apart | dict(given or {})
        if (Path(source) / INDEX).is_file():
            absent, found = as_it_lies(Path(source), class_of(str(source)), set(known))
            known, kind = absent | known, kind | found
        pipe = imported("DiffusionPipeline").from_pretrained(str(source), **known, **kind)
    return placed(pipe, place, *apart)


@contextmanager
def _one_sentence(source: str | Path, local: bool) -> Iterator[None]:
    """Whatever the loaders raise becomes one sentence."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # diffusers, transformers and the hub each have their own
        where = "Cannot load" if local else "There is no such folder, and the hub does not give"
        said = f"{where} {source}: {first_line(error, 200) or type(error).__name__}"
        raise ModelError(said) from error


def _shared(source: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """The parts that a demo model has from another one and its folder lacks.

    In a clone, `demo-unet/vae` is a link. A wheel leaves it out, so as to reuse the autoencoder
    once, and a checkout without links (Windows) has a text file in its place.
    """
    folder = Path(source)
    ours = folder.name.startswith("demo-") and (folder / INDEX).is_file()
    vae = folder.parent / OWNER / "vae"
    if not ours or (folder / "vae").is_dir() or not vae.is_dir():
        return {}
    return {"vae": imported("AutoencoderKL").from_pretrained(str(vae), **options)}
