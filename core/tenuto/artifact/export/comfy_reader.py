"""What a file of `comfy_quant` layers stands for, read as the host reads it, and what is wrong.

ComfyUI computes noise without a word from most damaged files; here each is refused in a sentence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import ArtifactError, SchemeError
from ...numerics import native
from ...text import printable

MARK, HEADER = "comfy_quant", "_quantization_metadata"
NARROW = (torch.int8, torch.uint8, torch.float8_e4m3fn)
Get = Callable[[str], Tensor]


class ComfyFile:
    """An open file."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path = file, path
        self.names = set(file.keys())

    @cached_property
    def layers(self) -> dict[str, dict[str, Any]]:
        """What it says of each quantized layer, by its name in the file."""
        marked = [name for name in sorted(self.names) if name.endswith(f".{MARK}")]
        return {name[: -len(MARK) - 1]: self._facts(name) for name in marked}

    def check(self) -> None:
        """ArtifactError where header and tensors do not fit each other, or codes have no mark."""
        self._check_header(self.file.metadata() or {})
        self._check_others()

    def decode(self, layer: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The weight (N, K) of a layer in fp32, in the order of the host's own arithmetic.

        shape: the model's, where a file may have padded it.
        """
        facts = self._facts(f"{layer}.{MARK}")
        reader = READERS.get(str(facts.get("format")))
        if reader is None:
            raise self._wrong(f"{layer} is of no format that ComfyUI knows")
        weight = self._tensor(layer, "weight")
        if weight.ndim != 2:
            raise self._wrong(f"{layer} is a convolution, and hosts read those wrongly")
        return reader(self, layer, facts, weight)[: None if shape is None else shape[0]]

    def _tensor(self, layer: str, end: str) -> Tensor:
        if f"{layer}.{end}" not in self.names:
            raise self._wrong(f"{layer} has no {end}")
        return self.file.get_tensor(f"{layer}.{end}")

    def _facts(self, name: str) -> dict[str, Any]:
        found = self.file.get_tensor(name)
        if found.dtype is not torch.uint8 or found.ndim != 1:
            raise self._wrong(f"{name} is not a text in bytes")
        try:
            facts = json.loads(bytes(found.tolist()))
        except ValueError as error:
            raise self._wrong(f"{name} is not JSON") from error
        if not isinstance(facts, dict):
            raise self._wrong(f"{name} is no object")
        return facts

    def _check_header(self, metadata: dict[str, str]) -> None:
        """Names and entries in the header are those of the tensors: some versions read it alone."""
        try:
            layers = json.loads(metadata.get(HEADER, "{}")).get("layers")
        except (ValueError, AttributeError) as error:
            raise self._wrong(f"its header's {HEADER} is not readable") from error
        if layers is not None and layers != self.layers:
            raise self._wrong(f"its header's {HEADER} is not what its tensors say")

    def _check_others(self) -> None:
        """Codes without a mark would be loaded as numbers."""
        for name in self.names:
            layer = name.removesuffix(".weight")
            if name == layer or layer in self.layers:
                continue
            if self.file.get_slice(name).get_dtype() in ("I8", "U8", "F8_E4M3"):
                raise self._wrong(f"{name} has codes, and nothing says of which format")

    def _scale(self, layer: str, name: str, *shapes: tuple[int, ...]) -> Tensor:
        found = self._tensor(layer, name)
        if found.dtype is not torch.float32 or tuple(found.shape) not in shapes:
            raise self._wrong(f"the {name} of {layer} has the wrong type or shape")
        if not bool(found.isfinite().all()):
            raise self._wrong(f"the {name} of {layer} is not finite")
        return found

    def _typed(self, layer: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.dtype is not dtype:
            raise self._wrong(f"the codes of {layer} are {weight.dtype}, not {dtype}")
        return weight

    def _wrong(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path} would be read wrongly: {printable(what)}.")


@contextmanager
def comfy_file(path: Path) -> Iterator[ComfyFile]:
    """A file to read; ArtifactError where it is damaged."""
    try:
        with safe_open(str(path), "pt") as file:
            yield ComfyFile(file, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"Cannot read {path}: {printable(error)}.") from error


def _int8(file: ComfyFile, layer: str, facts: dict[str, Any], weight: Tensor) -> Tensor:
    rows = len(weight)
    scale = file._scale(layer, "weight_scale", (), (rows, 1))
    value = file._typed(layer, weight, torch.int8).float() * scale
    if not facts.get("convrot"):
        return value
    return unrotated(file, layer, value, facts.get("convrot_groupsize", 256))


def _fp8(file: ComfyFile, layer: str, facts: dict[str, Any], weight: Tensor) -> Tensor:
    if "input_scale" not in facts and f"{layer}.input_scale" in file.names:
        file._scale(layer, "input_scale", ())
    elif not facts.get("full_precision_matrix_mult"):
        raise file._wrong(f"{layer} has no input_scale, which hosts take for 1")
    codes = file._typed(layer, weight, torch.float8_e4m3fn)
    return codes.float() * file._scale(layer, "weight_scale", ())


def unrotated(file: ComfyFile, layer: str, value: Tensor, group: Any) -> Tensor:
    """`value` (N, K), rotated in groups of K, in the basis of the layer's inputs."""
    power = isinstance(group, int) and group >= 4 and group == 4 ** ((group.bit_length() - 1) // 2)
    if not power or value.shape[1] % group:
        raise file._wrong(f"{layer} cannot be rotated in groups of {group}")
    matrix, base = torch.ones(1, 1), torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    while len(matrix) < group:
        matrix = torch.kron(base / 2, matrix)
    return (value.unflatten(1, (-1, group)) @ matrix).flatten(1)


def _w4a8(file: ComfyFile, layer: str, facts: dict[str, Any], weight: Tensor) -> Tensor:
    group, steps = facts.get("group_size", 16), file._tensor(layer, "weight_s_rel")
    if not isinstance(group, int) or steps.ndim != 2:
        raise file._wrong(f"{layer} has no groups")
    columns = steps.shape[1] * group
    if weight.shape[1] * 2 == columns and f"{layer}.weight_codebook" not in file.names:
        raise file._wrong(f"{layer} has no weight_codebook, which hosts take for equal distances")
    return _native(file, layer, facts, (len(weight), columns))


def _nvfp4(file: ComfyFile, layer: str, facts: dict[str, Any], weight: Tensor) -> Tensor:
    return _native(file, layer, facts, (len(weight), weight.shape[1] * 2))


def _native(file: ComfyFile, layer: str, facts: dict[str, Any], shape: tuple[int, int]) -> Tensor:
    """What `numerics.native` finds in the tensors of one layer."""
    start = f"{layer}."
    ends = {n.removeprefix(start) for n in file.names if n.startswith(start)} - {MARK, "bias"}
    tensors = {end: file.file.get_tensor(f"{start}{end}") for end in ends}
    try:
        return native.named(facts["format"]).decode(tensors, facts, shape)
    except SchemeError as error:
        raise file._wrong(f"{layer}: {str(error).rstrip('.')}") from error


READERS: dict[str, Callable[[ComfyFile, str, dict[str, Any], Tensor], Tensor]] = {
    "int8_tensorwise": _int8,
    "float8_e4m3fn": _fp8,
    "asym_w4a8_int8": _w4a8,
    "nvfp4": _nvfp4,
}
