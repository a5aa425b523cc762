"""Marks of what an exported file leaves in float: which model it is, whatever its layers became.

A fingerprint looks at every weight, and those of an exported file are rounded. What is in float
there is the model's own, to bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..model import KeyMap, Weights, swapped
from ..text import printable
from .fingerprint import PROBES

MARKS = "in_float"  # the header's key: canonical name -> first, middle and last value
Read = Callable[[str], Tensor]


def marks_of(names: Iterable[str], read: Read) -> dict[str, list[float]]:
    """Three values of `PROBES` evenly chosen ones of the parameters `names`."""
    known = sorted(names)
    places = torch.linspace(0, max(0, len(known) - 1), min(PROBES, len(known))).long().tolist()
    return {known[i]: _values(read(known[i])) for i in places}


def _values(x: Tensor) -> list[float]:
    flat = x.detach().reshape(-1)
    index = torch.tensor([0, flat.numel() // 2, flat.numel() - 1], device=flat.device)
    return [float(f"{v:.6g}") for v in flat.index_select(0, index).float().cpu().tolist()]


def reader(
    denoiser: nn.Module, keys: KeyMap | None, tensor: Callable[[str], Tensor] | None = None
) -> Read:
    """read(canonical name): a parameter of a model of diffusers (no keys) or of a host's.

    tensor: as in `localized`. LookupError or AttributeError where there is none.
    """
    values = Weights(denoiser)

    def read(name: str) -> Tensor:
        if keys is None:
            return values(denoiser.get_parameter(name))
        place = keys.places[name]
        own = denoiser.get_parameter(place.name) if tensor is None else tensor(place.name)
        found = values(own)[slice(*place.rows)]
        return swapped(found) if place.swapped else found

    return read


def check_marks(
    header: Mapping[str, Any],
    denoiser: nn.Module,
    keys: KeyMap | None,
    tensor: Callable[[str], Tensor] | None = None,
) -> None:
    """ArtifactError unless what is in float is that of `denoiser`, up to half precision."""
    kind = type(denoiser).__name__ if keys is None else keys.model_class
    if kind != header["model_class"]:
        wanted = printable(header["model_class"], 60)
        raise ArtifactError(f"The exported file is of a {wanted}, and the model is a {kind}.")
    read = reader(denoiser, keys, tensor)
    for name, values in header[MARKS].items():
        try:
            found = _values(read(name))
        except (LookupError, AttributeError):
            found = []
        pairs = zip(found, values, strict=False)
        near = all(abs(a - b) <= 2**-7 * max(abs(a), abs(b)) + 1e-6 for a, b in pairs)
        if len(found) != len(values) or not near:
            raise ArtifactError(
                "The exported file is of another model: what is in float differs at "
                f"{printable(name, 80)}."
            )
