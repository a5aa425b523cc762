"""Compact weights: of an artifact's codes only what the model's own weights do not tell.

A code lies near that of the model's own weight, n = clip(round(w / s) + z): the file keeps d = code
- n, several to a byte, in a zlib stream, and a checksum of the levels (code - z). An 8-bit layer
that was rounded to nearest needs no more than its scales. Who attaches such an artifact has the
model at hand; `expanded` puts the codes back, bit for bit, or says that it is another model.

In the file: `weights/NAME.delta`, uint8 (bytes,), in the place of `weights/NAME.qdata`, and in the
header "compact": {NAME: {"most": the largest |d|, "crc32": of the codes as int8, row by row}}.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..model import Weights, denoiser_of, layers, parts_of
from ..numerics import Format, Grid, QTensor, Scheme, float8
from ..numerics.scheme import LEVELS
from .artifact import Artifact

LEVEL = 9  # of zlib


def compact(artifact: Artifact, model: Any) -> Artifact:
    """`artifact` with compact weights; `model` is the one that it was made for. Loses nothing."""
    artifact.check(model)
    denoisers = parts_of(model)
    if not artifact.parts.keys() <= denoisers.keys():
        raise ArtifactError("The artifact is of several denoisers: give the pipeline that has all.")
    if not artifact.parts:
        return _compact(artifact, denoisers[""])
    parts = {name: _compact(part, denoisers[name]) for name, part in artifact.parts.items()}
    return replace(_compact(artifact.alone(), denoisers[""]), parts=parts)


def _compact(artifact: Artifact, model: Any) -> Artifact:
    """`compact` of one denoiser."""
    if "compact" in artifact.header:
        return artifact
    tensors, facts = dict(artifact.tensors), {}
    for name, form, weight in _layers(artifact, model):
        q = QTensor.from_tensors(artifact.section("weights"), name, weight.shape, form)
        levels = q.levels().to("cpu", torch.int16)
        delta = levels - _grid(tensors, name, form).nearest(weight).to(torch.int16)
        most = int(delta.abs().max()) if delta.numel() else 0
        del tensors[f"weights/{name}.qdata"]
        tensors[f"weights/{name}.delta"] = _pack(delta, most)
        facts[name] = {"most": most, "crc32": _checksum(levels)}
    return Artifact(artifact.header | {"compact": facts}, tensors)


def expanded(artifact: Artifact, model: Any) -> Artifact:
    """`artifact` with its codes in full; as it is if they are. ArtifactError if they do not fit."""
    if "compact" not in artifact.header:
        return artifact
    tensors = dict(artifact.tensors)
    for name, form, weight in _layers(artifact, model):
        try:
            facts = artifact.header["compact"][name]
            grid = _grid(tensors, name, form)
            most, wanted = int(facts["most"]), int(facts["crc32"])
            delta = _unpack(tensors.pop(f"weights/{name}.delta"), most, weight.numel())
        except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
            raise ArtifactError(f"The artifact is damaged: {name} cannot be expanded.") from error
        levels = grid.nearest(weight).to(torch.int16) + delta.view(weight.shape)
        if _checksum(levels) != wanted:
            raise ArtifactError(
                f"The weights of {name} are not those that the artifact was made from: load the "
                "model in the precision in which it is stored."
            )
        q = QTensor.of(levels.float(), grid)
        tensors |= {f"weights/{key}": value for key, value in q.tensors(name).items()}
    header = {key: value for key, value in artifact.header.items() if key != "compact"}
    return Artifact(header, tensors)


def _layers(artifact: Artifact, model: Any) -> Iterator[tuple[str, Format, Tensor]]:
    """(name, format, the model's own weight in fp32 on the CPU) of every layer with codes."""
    denoiser = denoiser_of(model)
    by_name, values = dict(layers(denoiser)), Weights(denoiser)
    schemes = {k: Scheme.from_json(v) for k, v in artifact.header.get("schemes", {}).items()}
    for name, facts in artifact.header.get("layers", {}).items():
        layer = by_name.get(name)
        if layer is None or tuple(layer.weight.shape) != tuple(facts["shape"]):
            raise ArtifactError(f"The model has no layer {name} of shape {facts['shape']}.")
        weight = values(layer.weight).to("cpu", torch.float32)
        yield name, schemes[facts["scheme"]].weight, weight


def _grid(tensors: dict[str, Tensor], name: str, form: Format) -> Grid:
    """The grid of a layer as the file has it."""
    parts = (tensors.get(f"weights/{name}.{part}") for part in ("zero_point", "step"))
    zero, step = (None if t is None else t.cpu() for t in parts)
    if step is not None:
        own = form.dtype in LEVELS
        step = float8.numbers(step) if own else step.float()
    zero = None if zero is None else zero.float()
    scale = tensors[f"weights/{name}.scale"].cpu()
    if zero is None or form.symmetric:
        zero = torch.zeros_like(scale)
    return Grid(scale, zero if zero.ndim == 2 else zero[:, None], step, form)


def _checksum(codes: Tensor) -> int:
    return zlib.crc32(codes.to(torch.int16).contiguous().numpy().tobytes())


def _digits(most: int) -> int:
    """How many numbers from -most to most one byte holds."""
    base, count = 2 * most + 1, 1
    while base > 1 and base ** (count + 1) <= 256:
        count += 1
    return count


def _pack(delta: Tensor, most: int) -> Tensor:
    """Differences as bytes: nothing at all where they are all zero."""
    if most == 0:
        return torch.empty(0, dtype=torch.uint8)
    if most > 127:
        raise ArtifactError("The codes are too far from the model's weights to be kept compact.")
    base, count = 2 * most + 1, _digits(most)
    flat = torch.nn.functional.pad(delta.flatten().long() + most, (0, -delta.numel() % count))
    weights = base ** torch.arange(count)
    raw = (flat.view(-1, count) * weights).sum(1).to(torch.uint8).numpy().tobytes()
    return torch.frombuffer(bytearray(zlib.compress(raw, LEVEL)), dtype=torch.uint8)


def _unpack(stream: Tensor, most: int, size: int) -> Tensor:
    """The inverse of `_pack`: int16 (size,). Never inflates to more than `size` needs."""
    if most == 0:
        return torch.zeros(size, dtype=torch.int16)
    if not 0 < most <= 127:
        raise ValueError("no such differences")
    base, count = 2 * most + 1, _digits(most)
    room = -(-size // count)
    machine = zlib.decompressobj()
    raw = machine.decompress(stream.cpu().numpy().tobytes(), room)
    if len(raw) != room or not machine.eof or machine.unused_data:
        raise ValueError("the stream has another length")
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()[:, None]
    digits = rows // base ** torch.arange(count) % base
    return (digits.flatten()[:size] - most).to(torch.int16)
