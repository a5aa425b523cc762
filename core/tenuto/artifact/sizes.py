"""Are the values of an artifact of the size that they must have: near those of the model's weights?

A damaged scale is a number like any other: the file is whole, and the images are noise, or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ArtifactError
from ..model import encoders_of, layers
from ..numerics import QTensor, Scheme, ends
from ..numerics.scheme import LEVELS
from ..text import printable
from .artifact import Artifact

BEYOND = 64.0  # times the model's largest weight: what no rounding makes of it
NOTHING = 1e-3  # the largest value in a layer whose weights are all zero
SAMPLE = 4096  # weights looked at first


def check_sizes(artifact: Artifact, denoiser: nn.Module, model: Any) -> None:
    """ArtifactError where a layer's codes stand for weights far larger than the model's own.

    model: has the text encoders, if there are any.
    """
    _check(denoiser, artifact.header, artifact.section("weights"))
    for name, encoder in encoders_of(model).items():
        facts, start = artifact.header.get("encoders", {}).get(name), f"{name}."
        if facts is not None:
            section = artifact.section("encoder").items()
            own = {k.removeprefix(start): t for k, t in section if k.startswith(start)}
            _check(encoder, facts, own)


def _check(model: nn.Module, header: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    by_name = dict(layers(model))
    schemes = {k: Scheme.from_json(v) for k, v in header.get("schemes", {}).items()}
    for name, facts in header.get("layers", {}).items():
        layer, form = by_name.get(name), schemes[facts["scheme"]].weight
        if layer is None or tuple(layer.weight.shape) != tuple(facts["shape"]):
            continue  # attaching refuses it
        weight = layer.weight.detach()
        if weight.is_meta or not weight.is_floating_point():
            continue
        q = QTensor.from_tensors(tensors, name, facts["shape"], form)
        if not _fits(q, _highest(form), weight):
            said = f"the scale of {printable(name)} does not fit the model's weights"
            raise ArtifactError(f"The artifact is damaged: {said}.")


def _highest(form: Any) -> float:
    """The largest number that a scale multiplies."""
    if form.dtype in LEVELS:
        return LEVELS[form.dtype].HIGHEST
    if form.dtype != "int":
        return ends(form)[1]
    return 128.0 if form.group else 2.0**form.bits


def _fits(q: QTensor, highest: float, weight: Tensor) -> bool:
    most = float(q.scale.max()) * highest
    if q.channel is not None:
        most /= float(q.channel.min())
    flat = weight.reshape(-1)
    some = float(flat[:: max(1, flat.numel() // SAMPLE)].float().abs().max())
    if most <= BEYOND * some + NOTHING:
        return True
    limit = BEYOND * float(weight.float().abs().max()) + NOTHING
    return most <= limit or float(q.dequantize().abs().max()) <= limit
