"""A pipeline whose large parts stay on disk: a layer of a block is read when it is called.

For models larger than memory. Hooks of accelerate read the weights out of the safetensors files,
which are not copied; what lies outside of the denoiser's blocks is in memory.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ModelError
from ..model import describe
from .libraries import imported
from .processes import processes
from .single_file import CODES, DENOISERS, MODELS, checked, index_of, pointed, values_of
from .weight_files import parts_in, variant_of, variants_in, weight_files

SHARE = 0.5  # of the free memory that a model may take
LARGE = 2**30  # bytes of a text encoder that is read layer by layer


class Shards(Mapping[str, Tensor]):
    """The tensors in the safetensors files of a folder by name, each read anew, in `dtype`.

    wide: parts of names whose tensors are in fp32. coded: a weight that is quantized, or "".
    ModelError if no file can be read.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, wide: tuple[str, ...] = ()) -> None:
        self.dtype, self.wide = dtype, wide
        self.files: dict[str, Path] = {}
        self.size, self.coded = 0, ""  # bytes of all tensors in `dtype`
        for file in weight_files(folder, variant_of(folder.parent)):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    self.files[name] = file
                    tensor = opened.get_slice(name)
                    self.size += prod(tensor.get_shape()) * self.dtype.itemsize
                    if tensor.get_dtype() in CODES and name.endswith("weight"):
                        self.coded = self.coded or name
        if not self.files:
            raise ModelError(f"{folder} has no safetensors file to read block by block.")

    def type_of(self, name: str) -> torch.dtype:
        """The type of a floating tensor."""
        return torch.float32 if set(self.wide) & set(name.split(".")) else self.dtype

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as opened:
            found = opened.get_tensor(name)
            dtype = self.type_of(name) if found.is_floating_point() else found.dtype
            return found.to(dtype, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def parts_of(folder: Path) -> dict[str, tuple[str, str]]:
    """The parts of a pipeline that have weights: name -> (library, class)."""
    variant = variant_of(folder)
    return {name: row for name, row in parts_in(folder) if weight_files(folder / name, variant)}


def check_in_float(folder: Path) -> None:
    """ModelError where a denoiser in a pipeline's folder is quantized, by its config or weights."""
    for name, (library, _) in parts_of(folder).items():
        if library != "diffusers" or not name.startswith(DENOISERS):
            continue
        config = folder / name / "config.json"
        facts = json.loads(config.read_text("utf-8")) if config.is_file() else {}
        if "quantization_config" in facts or Shards(folder / name, torch.float32).coded:
            raise ModelError(
                f"{folder / name} is already quantized: export the model that it was made of."
            )


def is_too_large(folder: Path, dtype: torch.dtype) -> bool:
    """Whether the model would take more than a share of the memory that is free."""
    import psutil

    if pointed(folder):
        single, (_, parts) = checked(folder), index_of(folder)
        models = {name: row for name, row in parts.items() if name.startswith(MODELS)}
        whole = sum(values_of(single, name, kind) for name, (_, kind) in models.items())
        whole *= dtype.itemsize
    else:
        whole = sum(Shards(folder / name, dtype).size for name in parts_of(folder))
    return whole * processes().size > SHARE * psutil.virtual_memory().available


def parts_on_disk(
    folder: Path, device: Any, dtype: torch.dtype, encoders: bool = True
) -> dict[str, nn.Module]:
    """The denoisers of a pipeline and, unless `encoders` is False, its large text encoders."""
    found: dict[str, nn.Module] = {}
    variant = variant_of(folder)
    for name, (library, kind) in parts_of(folder).items():
        if library == "diffusers" and name.startswith(DENOISERS):
            found[name] = _denoiser(imported(kind), folder / name, device, dtype)
        elif library != "transformers" or not encoders:
            continue
        elif Shards(folder / name, dtype).size > LARGE:
            own = variant if variant in variants_in(folder / name) else None
            found[name] = encoder_on_disk(imported(kind, library), folder / name, dtype, own)
    return found


def _denoiser(kind: Any, folder: Path, device: Any, dtype: torch.dtype) -> nn.Module:
    """A denoiser with hooks; ModelError if its file has other names than the class."""
    shards = Shards(folder, dtype, wide_of(kind))
    model = empty_model(kind, folder, dtype)
    if not model.state_dict().keys() <= shards.files.keys():
        raise ModelError(f"{folder} is in an older format, which is only read as a whole.")
    return left_on_disk(model, shards, device)


def placed(pipe: Any, device: Any, *but: str) -> Any:
    """`pipe` with its modules on `device`, all `but` those of which blocks stay on disk."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in but:
            part.to(device)
    return pipe


def wide_of(kind: Any) -> tuple[str, ...]:
    """Parts of names whose tensors a class of diffusers keeps in fp32."""
    return tuple(kind._keep_in_fp32_modules or ())


def left_on_disk(model: nn.Module, weights: Any, device: Any) -> nn.Module:
    """A model without values, with hooks that read a block when it is called; the rest is read.

    weights: a mapping with `type_of`, such as `Shards`. What it has not, the model has made.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
    from accelerate.utils import set_module_tensor_to_device

    blocks = describe(model).blocks
    for name, tensor in model.state_dict().items():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if inside and tensor.is_meta:
            value = tensor.to(weights.type_of(name)) if tensor.is_floating_point() else tensor
            set_module_tensor_to_device(model, name, "meta", value=value, dtype=value.dtype)
        else:
            value = weights.get(name, tensor)
            set_module_tensor_to_device(model, name, device, value=value, dtype=value.dtype)
    for block in blocks:
        attach_align_device_hook(
            model.get_submodule(block), device, offload=True, weights_map=weights,
            module_name=block,
        )  # fmt: skip
    add_hook_to_module(model, AlignDevicesHook(device))
    return model.eval().requires_grad_(False)


def empty_model(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model of diffusers without values; what its file does not have, it makes itself."""
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            return kind.from_config(kind.load_config(str(folder), local_files_only=True))
    finally:
        torch.set_default_dtype(before)


def encoder_on_disk(
    kind: Any, folder: Path, dtype: torch.dtype, variant: str | None = None
) -> nn.Module:
    """A text encoder of transformers with hooks; what is not as in its file is in a folder."""
    aside = tempfile.mkdtemp(prefix="tenuto-")
    model = kind.from_pretrained(
        str(folder), dtype=dtype, device_map={"": "disk"}, offload_folder=aside,
        use_safetensors=True, local_files_only=True, variant=variant,
    )  # fmt: skip
    weakref.finalize(model, shutil.rmtree, aside, ignore_errors=True)
    _widen(model, dtype)
    return model.eval()


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Give what transformers keeps in fp32 this type on disk too, where it forgets to."""
    wide = model._get_dtype_plan(dtype)  # parts of names -> type
    for place, module in model.named_modules() if wide else ():
        for name, parameter in list(module.named_parameters(place, recurse=False)):
            kind = next((wide[part] for part in name.split(".") if part in wide), None)
            if parameter.is_meta and kind is not None:
                loader = module._hf_hook.weights_map.dataset
                loader.index[name]["dtype"] = str(kind).removeprefix("torch.")
                made = nn.Parameter(parameter.to(kind), requires_grad=parameter.requires_grad)
                setattr(module, name.rpartition(".")[2], made)
