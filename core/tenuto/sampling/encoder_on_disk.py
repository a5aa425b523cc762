"""A text encoder larger than memory: a block's weights are read when it is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ModelError
from ..model import describe

SHARE = 0.5  # of the free memory that an encoder may take
COPIES = 3  # in fp32: the one that is quantized, the one that it is to be like, and another one
WRAPPERS = ("model", "language_model")  # in names of files, here or there


def plain_name(name: str) -> str:
    """A parameter's name without the models around it: files have it in several places."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class Files(Mapping[str, Tensor]):
    """The tensors of safetensors files by the names of a model, each read anew."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str]) -> None:
        own = {plain_name(name): name for name in names}
        self.places: dict[str, tuple[Path, str]] = {}
        for path in paths:
            with safe_open(str(path), "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    name = own.get(plain_name(key))
                    if name is not None:
                        self.places[name] = path, key

    def __getitem__(self, name: str) -> Tensor:
        path, key = self.places[name]
        with safe_open(str(path), "pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor, without its values."""
        path, key = self.places[name]
        with safe_open(str(path), "pt") as file:
            found = file.get_slice(key)
            return TYPES[found.get_dtype()], tuple(found.get_shape())


TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def size_in_memory(paths: Sequence[Path]) -> int:
    """Bytes that quantizing an encoder takes where it is in memory as a whole."""
    count = 0
    for path in paths:
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118
                count += torch.Size(file.get_slice(name).get_shape()).numel()
    return 4 * COPIES * count


def is_too_large(paths: Sequence[Path], max_memory: int | None) -> bool:
    """Whether an encoder is to stay on disk. max_memory: bytes; None: a share of what is free."""
    import psutil

    most = SHARE * psutil.virtual_memory().available if max_memory is None else max_memory
    return size_in_memory(paths) > most


def on_disk(
    kind: Any, config: Any, paths: Sequence[Path], device: Any, unread: tuple[str, ...] = ()
) -> nn.Module:
    """An encoder whose blocks are read when they are called; ModelError if a tensor is missing.

    unread: how the names of what reads no text begin, which may be missing.
    """
    from accelerate import init_empty_weights
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
    from accelerate.utils import set_module_tensor_to_device

    with init_empty_weights(include_buffers=False):
        model = kind(config)
    tied = getattr(model, "_tied_weights_keys", None) or {}
    state = model.state_dict()
    files = Files(paths, [*state])
    device = torch.device(device or "cpu")
    blocks = describe(model).blocks
    inside = tuple(f"{block}." for block in blocks)
    for name, tensor in state.items():
        if name not in files and name in tied:
            continue
        if name not in files and name.startswith(unread):
            blank = torch.zeros(tensor.shape, device=device)
            set_module_tensor_to_device(model, name, device, value=blank)
            continue
        dtype, shape = _checked(files, name, tensor)
        value = torch.empty(shape, dtype=dtype, device="meta")
        value = value if name.startswith(inside) else files[name]
        place = "meta" if name.startswith(inside) else device
        set_module_tensor_to_device(model, name, place, value=value, dtype=dtype)
    model.tie_weights()
    for block in blocks:
        attach_align_device_hook(
            model.get_submodule(block), device, offload=True, weights_map=files,
            module_name=block,
        )  # fmt: skip
    add_hook_to_module(model, AlignDevicesHook(device))
    return model.eval().requires_grad_(False)


def _checked(files: Files, name: str, tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    if name in files:
        dtype, shape = files.spec(name)
        if shape == tuple(tensor.shape):
            return dtype, shape
    raise ModelError(f"The files are not those of this config: {name} is missing or of another "
                     "size.")  # fmt: skip
