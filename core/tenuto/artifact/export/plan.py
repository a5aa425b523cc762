"""What there is to export: the tensors of a host's file, and where each comes from.

A tensor of a host is made of one or several parameters of the diffusers model, row by row. A layer
has a float weight, and codes where an artifact quantizes it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, TenutoError
from ...model import (
    Backbone,
    KeyMap,
    Place,
    Weights,
    adapted,
    check_weights,
    describe,
    key_map_of,
    layers,
    parts_of,
    swapped,
)
from ...numerics import QTensor, Scheme, ends
from ..artifact import Artifact, tabled
from ..host_names import in_host, localized
from ..in_float import marks_of, reader


@dataclass(frozen=True)
class Settings:
    """How a format is written.

    scheme: of layers without codes; None leaves them in float. prefix: before every name. inputs:
    canonical layer -> the largest size of its inputs, where a recorded pass found it. library:
    whose layers a folder has.
    """

    scheme: str | None = None
    prefix: str = ""
    inputs: Mapping[str, float] = field(default_factory=dict)
    library: str = "torchao"


@dataclass
class Plan:
    """One denoiser, under the names of `keys`.

    artifact: what is known of it, in these names, or None. original: the same as it was given, in
    canonical names. dropped: one sentence on each thing that the format cannot hold. more: tensors
    that are written as they are. about: of a text encoder what a header says of it, which goes
    without a companion. tables: its embeddings that have codes.
    """

    denoiser: nn.Module
    keys: KeyMap
    backbone: Backbone
    artifact: Artifact | None = None
    original: Artifact | None = None
    dropped: list[str] = field(default_factory=list)
    more: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] | None = None
    tables: frozenset[str] = frozenset()

    @cached_property
    def parts(self) -> dict[str, list[tuple[str, Place]]]:
        """The host's tensor -> the canonical ones that it is made of, in the order of the rows."""
        found: dict[str, list[tuple[str, Place]]] = {}
        for name, place in self.keys.places.items():
            found.setdefault(place.name, []).append((name, place))
        for host, some in found.items():
            some.sort(key=lambda part: part[1].rows)
            ends = [0, *(place.rows[1] for _, place in some)]
            if [place.rows[0] for _, place in some] != ends[:-1]:
                raise ModelError(f"Not all rows of {host} are in the model.")
        return dict(sorted(found.items()))

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        found = self.denoiser.named_parameters(remove_duplicate=False)
        return dict(found) | dict(self.denoiser.named_buffers(remove_duplicate=False))

    @cached_property
    def _values(self) -> Weights:
        return Weights(self.denoiser)

    def shape(self, host: str) -> tuple[int, ...]:
        """The shape of a host's tensor."""
        first = self.parts[host][0][0]
        shape = tuple(self._own[first].shape)
        return (self.parts[host][-1][1].rows[1], *shape[1:]) if shape else shape

    def dtype(self, host: str, wanted: torch.dtype) -> torch.dtype:
        """`wanted` for what is floating, else the tensor's own type."""
        own = self._own[self.parts[host][0][0]]
        return wanted if own.is_floating_point() else own.dtype

    def value(self, host: str) -> Tensor:
        """The values of a host's tensor on the CPU, in fp32 where they are floating."""
        found = []
        for name, place in self.parts[host]:
            own = self._values(self._own[name]).to("cpu")
            own = own.float() if own.is_floating_point() else own
            if not bool(own.isfinite().all()):
                raise ModelError(f"{name} has values that are no finite numbers.")
            found.append(swapped(own) if place.swapped else own)
        return torch.cat(found) if len(found) > 1 else found[0]

    @cached_property
    def linears(self) -> frozenset[str]:
        """The host's layers that are linears."""
        own = {name for name, layer in layers(self.denoiser) if isinstance(layer, nn.Linear)}
        return frozenset(
            host.removesuffix(".weight")
            for host, some in self.parts.items()
            if host.endswith(".weight") and all(n.removesuffix(".weight") in own for n, _ in some)
        )

    @cached_property
    def inner(self) -> frozenset[str]:
        """The linears inside of blocks whose precision hosts leave to the file.

        First and last layers, embedders and what a family keeps are none: hosts read sizes and
        types from some of them, and all need more bits.
        """
        kept = (*self.backbone.ends, *self.backbone.keep)
        blocks = tuple(f"{name}." for name in self.backbone.blocks)

        def is_inner(host: str) -> bool:
            names = [name.removesuffix(".weight") for name, _ in self.parts[f"{host}.weight"]]
            ended = any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in kept)
            return not ended and all(name.startswith(blocks) for name in names)

        return frozenset(filter(is_inner, self.linears))

    def scheme(self, host: str) -> Scheme | None:
        """The scheme in which an artifact has a layer; None where it leaves it in float."""
        if self.artifact is None:
            return None
        facts = self.artifact.header.get("layers", {}).get(host)
        if facts is None:
            return None
        return Scheme.from_json(self.artifact.header["schemes"][facts["scheme"]])

    def codes(self, host: str) -> QTensor | None:
        """The codes of a layer; None where it has none."""
        scheme = self.scheme(host)
        if scheme is None or self.artifact is None:
            return None
        shape = self.artifact.header["layers"][host]["shape"]
        known = self.artifact.section("weights")
        return QTensor.from_tensors(known, host, shape, scheme.weight)

    def largest_inputs(self, host: str) -> Tensor | None:
        """The largest size of a layer's inputs at every step (T,), as an artifact stores it."""
        scheme = self.scheme(host)
        if self.artifact is None or scheme is None or scheme.activation is None:
            return None
        if not scheme.stored:
            return None
        known = self.artifact.tensors
        scale, zero = (known[f"ranges/{host}.{end}"] for end in ("scale", "zero_point"))
        low, high = ends(scheme.activation)
        return torch.maximum((low - zero).abs(), (high - zero).abs()) * scale

    def in_float(self, layers: Container[str]) -> dict[str, list[float]]:
        """Marks of what is in float where `layers` of the host are not."""
        inside = key_map_of(self.denoiser)  # of a host's own model
        places = (inside or self.keys).places
        read, own = reader(self.denoiser, inside), self._own
        return marks_of(
            (
                name
                for name, place in places.items()
                if (x := own[place.name if inside else name]).is_floating_point()
                and x.numel()
                and place.name.removesuffix(".weight") not in layers
                and isinstance(x, nn.Parameter)
            ),
            read,
        )

    def quantized(self) -> Iterator[str]:
        """The host's layers that the artifact quantizes."""
        if self.artifact is not None:
            yield from self.artifact.header.get("layers", {})


def planned(model: Any, keys_of: Any, artifact: Artifact | None = None, part: str = "") -> Plan:
    """A plan of one denoiser of `model`; TenutoError where it cannot be exported.

    keys_of: denoiser -> the key map of a format. part: as `parts_of` names denoisers.
    """
    denoisers = parts_of(model)
    if part not in denoisers:
        known = ", ".join(name or "the main one" for name in denoisers)
        raise ModelError(f"The model has no denoiser {part!r}: it has {known}.")
    denoiser = denoisers[part]
    _check(denoiser)
    backbone = describe(denoiser)
    keys = keys_of(denoiser)
    plan = Plan(denoiser, keys, backbone)
    if len(denoisers) > 1:
        others = ", ".join(name or "the main one" for name in denoisers if name != part)
        plan.dropped.append(f"Of several denoisers one goes into a file; the others: {others}.")
    if artifact is not None:
        own = artifact.by_denoiser(model).get(part)
        if own is None:
            raise TenutoError(f"The artifact has nothing of {part}.")
        if not own.header.get("layers"):
            raise TenutoError("The artifact quantizes no layer of the denoiser: nothing to export.")
        plan.original = own
        local = localized(own, denoiser)
        plan.artifact = in_host(_exported(local, plan.dropped), keys)
    _ = plan.parts
    return plan


def _check(denoiser: nn.Module) -> None:
    """What cannot be exported is said here, before anything is computed."""
    kind = type(denoiser).__name__
    if any(cls.__name__ == "PreTrainedModel" for cls in type(denoiser).__mro__):
        raise ModelError(
            f"{kind} is a text encoder: denoisers alone are exported, and hosts compute nonsense "
            "with a quantized CLIP without a word."
        )
    config = getattr(denoiser, "config", None)
    marked = getattr(config, "quantization_config", None) is not None
    coded = any(map(_is_coded, denoiser.parameters()))
    if marked or coded:
        raise ModelError(
            f"{kind} is already quantized: export the model of 16 or 32 bits that it was made of."
        )
    if adapted(denoiser):
        raise ModelError(
            f"{kind} has a LoRA or another adapter beside its layers: merge it (fuse_lora, then "
            "unload_lora_weights), or use it in the host."
        )
    check_weights(denoiser, hooked=True)


def _is_coded(parameter: Tensor) -> bool:
    """Whether a parameter is quantized: in few bits, or of a class of its own (torchao, hosts)."""
    plain = type(parameter.data) in (Tensor, nn.Parameter)
    return not plain or parameter.dtype.itemsize < 2 or not parameter.is_floating_point()


def _exported(artifact: Artifact, dropped: list[str]) -> Artifact:
    """What of an artifact goes under a host's names: codes and ranges of layers.

    Of the rest, what is left out is said; a cache schedule and a forecast travel as they are.
    """
    header = dict(artifact.header)
    tables = tabled(header)
    if tables:
        dropped.append(
            f"Tables of {len(tables)} time-only modules: hosts have none; these layers are written "
            "as the model has them."
        )
    if header.get("encoders"):
        dropped.append(
            "Quantized text encoders: they stay as the host has them (a quantized CLIP is read "
            "wrongly there)."
        )
    for key in ("temporal", "route", "forecast", "encoders", "parts"):
        header.pop(key, None)
    kept = ("weights/", "ranges/")
    return Artifact(header, {k: v for k, v in artifact.tensors.items() if k.startswith(kept)})
