"""A text encoder by itself: from a folder of transformers, a pipeline's folder, or a single file.

All that can be seen from the files alone is checked before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ModelError
from ..model.encoder_names import TOKENS, EncoderNames, check_read, names_of
from ..text import first_line, printable
from .encoder_on_disk import is_too_large, on_disk
from .libraries import imported, quiet_loading
from .low_memory import CODES
from .weight_files import variant_alone, weight_files

MARKS = (".comfy_quant", ".scale_weight", ".weight_scale", ".qweight", "scaled_fp8", ".SCB")
KINDS = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}


@dataclass(frozen=True)
class EncoderSource:
    """Where an encoder is. kind: its `model_type`. files: with its weights. folder: of its config.

    single: whether the weights are one file under hosts' names. tokens: tensors of the file that
    have its tokenizer's files.
    """

    kind: str
    folder: Path
    files: tuple[Path, ...]
    single: bool = False
    tokens: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> EncoderNames:
        """Under which names files have it."""
        return names_of(self.kind)

    def tokenizer_tensors(self) -> dict[str, Tensor]:
        """The tensors with the tokenizer that hosts look for in a file, byte for byte.

        From the file that it came from, else from its folder. ModelError where there are none.
        """
        if self.tokens or self.names.tokens is None:
            return dict(self.tokens)
        name, file = self.names.tokens
        found = next((p for p in _near(self.folder, file) if p.is_file()), None)
        if found is None:
            raise ModelError(
                f"ComfyUI reads the tokenizer of a {self.kind} from its file, and {self.folder} "
                f"has no {file}: put it there."
            )
        return {name: torch.frombuffer(bytearray(found.read_bytes()), dtype=torch.uint8)}

    def tokenizer(self) -> Any:
        """The tokenizer of the folder; ModelError where it has none."""
        auto = imported("AutoTokenizer", "transformers")
        places = [f for f in _folders(self.folder) if any(f.glob("*token*")) or _spiece(f)]
        with _one_sentence(self.folder), quiet_loading():
            if not places:
                raise ModelError(f"{self.folder} has no tokenizer: prompts cannot be read.")
            return auto.from_pretrained(str(places[0]), local_files_only=True)

    def unused(self) -> list[str]:
        """One sentence on each part of the files that reads no prompt and is in no file of ours."""
        names = [name for path in self.files for name in _names(path)]
        found = []
        if any(name.endswith("lm_head.weight") for name in names):
            found.append("The head: a text is encoded without it, and a host cannot write with "
                         "this file.")  # fmt: skip
        if any(name.startswith("decoder.") for name in names):
            found.append("The decoder: denoisers read the encoder.")
        return found

    def load(self, device: Any = None, max_memory: int | None = None) -> nn.Module:
        """The encoder without a head, in the type of its files; ModelError if a part is missing.

        One that is large for the memory, or for `max_memory` bytes, stays on disk but for what is
        outside its blocks.
        """
        library = imported("AutoConfig", "transformers")
        with _one_sentence(self.folder), quiet_loading():
            config = library.from_pretrained(str(self.folder), local_files_only=True)
            auto = imported(KINDS.get(self.kind, "AutoModel"), "transformers")
            kind = _class_of(auto, config)
            how: Any = {"output_loading_info": True, "dtype": "auto", "use_safetensors": True}
            if is_too_large(self.files, max_memory):
                return on_disk(kind, config, self.files, device, self.names.dropped)
            if self.single:
                state = {self.names.in_model(k): v for k, v in self._tensors()}
                model, info = kind.from_pretrained(None, config=config, state_dict=state, **how)
            else:
                how |= {"local_files_only": True, "variant": variant_alone(self.folder)}
                model, info = kind.from_pretrained(str(self.folder), **how)
        self._check(info)
        return model.eval().requires_grad_(False).to(device or "cpu")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path in self.files:
            with safe_open(str(path), "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name not in TOKENS:
                        yield name, file.get_tensor(name)

    def _check(self, info: dict[str, Any]) -> None:
        """A part that no file has would be made of random numbers."""
        missing = sorted(k for k in info["missing_keys"] if self.names.in_file(k) is not None)
        wrong = missing or sorted(str(k) for k in info.get("mismatched_keys") or ())
        if wrong:
            raise ModelError(
                f"{self.files[0]} is not the {self.kind} of its config: {printable(wrong[0])} is "
                f"missing or of another size ({len(wrong)} such)."
            )


def encoder_source(model: str, kinds: tuple[str, ...], config: Path | None = None) -> EncoderSource:
    """Where the encoder is that `model` names, one of `kinds`; ModelError says what is wrong.

    model: a folder of transformers, one of a pipeline (its encoder of such a type), or a file with
    the names that hosts have; then `config` is the folder with config.json and the tokenizer, or
    they are beside the file.
    """
    path = Path(model).expanduser()
    if not path.exists():
        raise ModelError(f"There is no file or folder {model}.")
    if path.is_file():
        return _of_file(path, (config or path.parent).expanduser(), kinds)
    if config is not None:
        raise ModelError("--config is for a single file: a folder has its own config.json.")
    folder = _encoder_folder(path, kinds) if (path / "model_index.json").is_file() else path
    facts = _config(folder)
    source = EncoderSource(_kind(facts, folder, kinds), folder, tuple(_weights(folder)))
    _check_files(source)
    return source


def _of_file(path: Path, folder: Path, kinds: tuple[str, ...]) -> EncoderSource:
    with _opened(path) as file:
        names = set(file.keys())
        tokens = {k: file.get_tensor(k) for k in TOKENS if k in names}
    if any(name.startswith(("text_model.", "transformer.text_model.")) for name in names):
        names_of("clip")
    _check_float(path)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{path.name} does not say what it is: give --config with the folder of its "
            "config.json and tokenizer."
        )
    source = EncoderSource(
        _kind(_config(folder), folder, kinds), folder, (path,), single=True, tokens=tokens
    )
    check_read(source.kind, _sized(_config(folder)))
    return source


def _encoder_folder(path: Path, kinds: tuple[str, ...]) -> Path:
    """The text encoder of a pipeline that has one of these types."""
    found = sorted(p for p in path.glob("text_encoder*") if (p / "config.json").is_file())
    known = {p: str(_config(p).get("model_type", "")) for p in found}
    fitting = [p for p, kind in known.items() if kind in kinds]
    if not fitting:
        has = ", ".join(kind or "unknown" for kind in known.values()) or "none"
        raise ModelError(
            f"{path} has no text encoder of the type {' or '.join(kinds)} (it has: {has})."
        )
    return fitting[0]


def _kind(facts: dict[str, Any], folder: Path, kinds: tuple[str, ...]) -> str:
    """The type of a config; ModelError where it is none of an encoder that is read as such."""
    if "_class_name" in facts:
        raise ModelError(
            f"{folder} is a {facts['_class_name']} of diffusers and no text encoder: tenuto export "
            "is for denoisers."
        )
    found = str(facts.get("model_type", ""))
    names_of(found)
    if found not in kinds:
        raise ModelError(
            f"This denoiser reads an encoder of the type {' or '.join(kinds)}, and {folder} has "
            f"one of the type {found}."
        )
    if "quantization_config" in facts:
        raise ModelError(f"{folder} is already quantized: give the model that it was made of.")
    return found


def _check_files(source: EncoderSource) -> None:
    if not source.files:
        raise ModelError(f"{source.folder} has no safetensors file with the weights.")
    for path in source.files:
        _check_float(path)
    check_read(source.kind, _sized(_config(source.folder)))


def _check_float(path: Path) -> None:
    """ModelError where a file is damaged or has codes."""
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            codes = file.get_slice(name).get_dtype() in CODES and name.endswith("weight")
            if codes or name.endswith(MARKS):
                raise ModelError(
                    f"{path.name} is already quantized ({printable(name)}): give the model of 16 "
                    "or 32 bits that it was made of."
                )


def _weights(folder: Path) -> list[Path]:
    """The files of a folder as its index lists them, else the only one."""
    try:
        found = weight_files(folder, variant_alone(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"The index of {folder} cannot be read: {first_line(error)}.") from error
    if gone := [path.name for path in found if not path.is_file()]:
        raise ModelError(f"{folder} is not whole: {gone[0]} is missing.")
    return found


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is no folder of a text encoder: it has no config.json.")
    return _json(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is no JSON object.")
    return found


class _sized:
    """A config's sizes as attributes."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.__dict__.update(facts)


def _class_of(kind: Any, config: Any) -> Any:
    """The class that `AutoModel` would take: it alone loads from tensors."""
    return kind if not hasattr(kind, "_model_mapping") else kind._model_mapping[type(config)]


def _folders(folder: Path) -> list[Path]:
    """Where the tokenizer of an encoder may be: with it, or beside it in a pipeline."""
    end = folder.name.removeprefix("text_encoder")
    beside = [folder.parent / f"{name}{end}" for name in ("tokenizer", "processor")]
    return [folder, *(b for b in beside if folder.name.startswith("text_encoder"))]


def _near(folder: Path, file: str) -> Iterator[Path]:
    yield from (place / file for place in _folders(folder))


def _spiece(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("spiece.model", "vocab.json"))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is no whole safetensors file: {printable(first_line(error))}."
        ) from error


@contextmanager
def _one_sentence(source: Path) -> Iterator[None]:
    """Whatever transformers raises becomes one sentence."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # each tokenizer and each config has its own
        raise ModelError(f"Cannot load {source}: {printable(first_line(error))}.") from error
