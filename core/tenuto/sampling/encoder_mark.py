"""Marks of a pipeline's text encoders, loaded or in its folder: whose states some states are.

A mark is a hash over all that an encoder computes with: every weight and buffer by its name, its
modules by class with their plain settings, its configuration. One in a folder is opened as loading
would give it and read a weight at a time, so that it has the mark of the loaded one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..files import bits_of, stamp
from ..model import Replacement, Weights, denoiser_of, device_and_dtype, encoders_of
from ..model.parts import ENCODER
from .described import SCALARS
from .libraries import LIBRARIES, imported, library, quiet_loading, silent
from .loading import HUB_ID, folder_of
from .prompt_settings import name_of, plain_of
from .single_file import pointed

CONFIG = {"dtype", "torch_dtype", "transformers_version", "architectures"}  # of the file, not of it
PLACES = {"name_or_path", "hf_device_map"}  # of a module: where it was and is
WEIGHTS = re.compile(r"model(?:-\d+-of-\d+)?(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors", re.ASCII)
_known = WeakIdKeyDictionary()  # tensor -> (what it was, the hash of its values)
_folders: dict[str, str] = {}  # files as they were -> the mark


def encoder_mark(pipe: Any) -> str | None:
    """The mark of a pipeline's text encoders; of its folder's where it has none loaded.

    None where there are neither. Values are hashed once: a tensor is looked at again when torch
    has counted a change of it, or when one of its probes, of which every row has one, is another.
    """
    loaded = encoders_of(pipe)
    if not loaded:
        return folder_mark(pipe)
    return _joined({name: module_mark(encoder) for name, encoder in loaded.items()})


def folder_mark(pipe: Any, known: MutableMapping[str, str] | None = None) -> str | None:
    """The mark of the text encoders in a pipeline's folder, in the type of its denoiser.

    None where it has no folder, or no encoder that transformers can open is in it. Of a hub id it
    is the folder that was downloaded; of several (revisions, variants) none, unless all have the
    same encoders. known: marks by `Folder.key`, to which new ones are added; as long as no file
    changes, none is read again.
    """
    known = {} if known is None else known
    marks = set[str | None]()
    for folder in folders_of(pipe):
        key = folder.key()
        found = known.get(key) or _folders.get(key) or folder.mark()
        if found is not None and folder.key() == key:  # it did not change meanwhile
            known[key] = _folders[key] = found
        marks.add(found)
    return marks.pop() if len(marks) == 1 else None


def note_folder(pipe: Any, known: MutableMapping[str, str], mark: str) -> None:
    """Note the mark of encoders that were loaded just now from a folder, and are as they were."""
    for folder in folders_of(pipe):
        known[folder.key()] = mark


def noted_folder(pipe: Any, known: Mapping[str, str]) -> str | None:
    """The mark that was noted for a pipeline's folder; None if it was not, or a file changed."""
    folders = folders_of(pipe)
    return known.get(folders[0].key()) if len(folders) == 1 else None


class Folder(NamedTuple):
    """Text encoders in a pipeline's folder, by the names of their folders in it."""

    path: Path
    names: tuple[str, ...]
    dtype: torch.dtype

    def key(self) -> str:
        """A hash over the files' places, sizes and times."""
        files = [file for name in self.names for file in sorted((self.path / name).iterdir())]
        facts = [str(self.path.resolve()), str(self.dtype), library("transformers").__version__]
        single = pointed(self.path)
        for file in files if single is None else (*files, single.file, *self._lent(single.rest)):
            facts.append(f"{file.parent.name}/{file.name} {stamp(file)}")
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _lent(self, rest: Path) -> list[Path]:
        """The files of encoders that a single file may lack."""
        return [file for name in self.names for file in sorted((rest / name).glob("*"))]

    def mark(self) -> str | None:
        """The mark of the encoders; None where one cannot be opened, or its variants differ."""
        found: dict[str, str] = {}
        for name in self.names:
            marks = {self._opened(name, variant) for variant in _variants(self.path / name)}
            one = marks.pop() if len(marks) == 1 else None
            if one is None:
                return None
            found[name] = one
        return _joined(found)

    def _opened(self, name: str, variant: str | None) -> str | None:
        from .low_memory import encoder_on_disk

        try:
            rows = json.loads((self.path / "model_index.json").read_text("utf-8"))
            owner, kind = rows[name]
            if owner not in LIBRARIES:
                return None
            with quiet_loading(), silent():
                made = encoder_on_disk(imported(kind, owner), self.path / name, self.dtype, variant)
            return module_mark(made)
        except Exception:  # whatever the loaders raise: it is not known then
            return None


def folders_of(pipe: Any) -> list[Folder]:
    """Where a pipeline's text encoders may have come from; not those whose tokenizer it lacks."""
    folder = folder_of(pipe)
    places = _snapshots(getattr(pipe, "name_or_path", None)) if folder is None else [folder]
    denoiser = denoiser_of(pipe)
    own = getattr(denoiser, "dtype", None)  # of a model of diffusers, without what stays in fp32
    dtype = own if isinstance(own, torch.dtype) else device_and_dtype(denoiser)[1]
    found = list[Folder]()
    for place in places:
        there = sorted(p.name for p in place.iterdir() if ENCODER.fullmatch(p.name))
        beside = {name: name.replace("text_encoder", "tokenizer") for name in there}
        names = tuple(n for n in there if vars(pipe).get(beside[n], beside) is not None)
        if not names:
            return []
        found.append(Folder(place, names, dtype))
    return found


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


def _variants(folder: Path) -> set[str | None]:
    """The sets of weights in a folder: None for the one without a name, "fp16" and the like."""
    found = (WEIGHTS.fullmatch(file.name) for file in folder.iterdir())
    return {match[1] for match in found if match is not None}


def _joined(marks: Mapping[str, str]) -> str:
    text = "\n".join(f"{name} {mark}" for name, mark in sorted(marks.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def module_mark(encoder: nn.Module) -> str:
    """Of a loaded encoder, with whatever is in it now; what is offloaded is read."""
    rows = list[list[Any]]()
    tensors = list[Tensor]()
    for name, module in encoder.named_modules():
        rows.append([name, name_of(type(module)), plain_of(_own(module))])
        for inner, value in sorted(_state(module).items()):
            rows.append([name, inner, list(_told(value, tensors))])
    rows.append([_settled(getattr(encoder, "config", None)), _hashes(tensors, Weights(encoder))])
    return _hash(rows)


def codes_mark(tensors: Mapping[str, Tensor]) -> str:
    """The mark of tensors by name, such as the codes that an artifact has of text encoders."""
    flat = list[Tensor]()
    rows = [[name, list(_told(x, flat))] for name, x in sorted(tensors.items())]
    return _hash([rows, _hashes(flat, lambda x: x)])


def _hash(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _own(module: nn.Module) -> dict[str, Any]:
    """The settings of one module; of a layer with adapters those that are on."""
    if isinstance(module, Replacement):  # it counts what it does
        return {"scheme": str(getattr(module, "scheme", ""))}
    found = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in PLACES}
    if isinstance(found.get("scaling"), dict):  # of PEFT
        found["on"] = [*getattr(module, "active_adapters", ())]
        found["off"] = bool(getattr(module, "disable_adapters", False))
    return found


def _state(module: nn.Module) -> dict[str, Any]:
    """All that one module has, in its own way of saving it, and what it does not save.

    Libraries that quantize save scales and codes that are no parameters.
    """
    found: dict[str, Any] = {}
    module._save_to_state_dict(found, "", True)
    return {name: value for name, value in (found | module._buffers).items() if value is not None}


def _told(value: Any, tensors: list[Tensor]) -> Iterator[str]:
    """A value in words; the plain tensors that it is made of are added to `tensors`."""
    if not isinstance(value, Tensor):
        parts = value.values() if isinstance(value, Mapping) else value
        if isinstance(value, list | tuple | Mapping):
            yield type(value).__name__
            for part in parts:
                yield from _told(part, tensors)
        else:
            yield repr(value) if isinstance(value, str | int | float) else type(value).__name__
        return
    yield f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
    yield json.dumps(plain_of({k: v for k, v in vars(value).items() if not k.startswith("_")}))
    inner = getattr(value, "__tensor_flatten__", None)
    if inner is not None and type(value) not in (Tensor, nn.Parameter):
        names, facts = inner()
        yield repr(facts)
        for name in names:
            yield from _told(getattr(value, name), tensors)
    elif value.is_quantized:
        yield repr((value.qscheme(), _scales(value)))
        tensors.append(value.int_repr())
    else:
        tensors.append(value)


def _scales(x: Tensor) -> Any:
    if x.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return x.q_scale(), x.q_zero_point()
    return x.q_per_channel_scales().tolist(), x.q_per_channel_zero_points().tolist()


def _settled(value: Any) -> Any:
    """A configuration without what a file or a run says of itself, the same in every process."""
    if hasattr(value, "to_dict"):
        return _settled(value.to_dict())
    if isinstance(value, Mapping):
        kept = {str(k): v for k, v in value.items() if k not in CONFIG}
        return {k: _settled(v) for k, v in kept.items() if not k.startswith("_")}
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return [_settled(item) for item in value]
    return value if isinstance(value, SCALARS) else type(value).__name__


def _hashes(tensors: list[Tensor], read: Callable[[Tensor], Tensor]) -> list[str]:
    """A hash of every tensor's values, on as many threads as torch has; known ones are kept."""

    def of(x: Tensor) -> tuple[Tensor, Any, str]:
        values = read(x)
        facts = _facts(x, values)
        known = _known.get(x)
        if known is not None and known[0] == facts:
            return x, facts, known[1]
        return x, facts, hashlib.sha256(bits_of(values).numpy().data).hexdigest()

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        found = list(threads.map(of, tensors))
    for x, facts, made in found:
        _known[x] = facts, made
    return [made for _, _, made in found]


def _facts(x: Tensor, values: Tensor) -> tuple[Any, ...]:
    """What a tensor is, as far as a look tells: values of every row, each in another column."""
    version = None if x.is_inference() else x._version
    place = None if x.is_meta else x.data_ptr()
    flat = values.detach().reshape(-1)
    width = values.shape[-1] if values.ndim else 1
    probes = bits_of(flat[:: max(1, width - 1)])
    return version, place, x.dtype, tuple(x.shape), hashlib.sha256(probes.numpy().data).digest()
