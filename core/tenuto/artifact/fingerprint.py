"""The fingerprint of a model's weights: which model an artifact was made for."""

from __future__ import annotations

import math
import platform
from typing import Any

import torch
from torch import nn

from ..errors import ArtifactError
from ..model import Weights, own_parameters
from ..resources import __version__

PROBES = 32  # weights looked at for a fingerprint


def fingerprint(denoiser: nn.Module) -> dict[str, Any]:
    """Marks of a denoiser's weights that survive a cast to half precision.

    names: how many floating parameters there are; values: the first, middle and last value of
    `PROBES` evenly chosen ones, taken from canonical names in order. Adapters do not count.
    """
    found = sorted(own_parameters(denoiser), key=lambda pair: pair[0])
    parameters = [
        (name, value) for name, value in found if value.is_floating_point() and value.numel()
    ]
    if not parameters:
        raise ArtifactError("The model has no floating-point weights.")
    values_of = Weights(denoiser)
    places = torch.linspace(0, len(parameters) - 1, min(PROBES, len(parameters))).long().tolist()
    values = []
    for place in places:
        flat = values_of(parameters[place][1]).reshape(-1)
        index = torch.tensor([0, flat.numel() // 2, flat.numel() - 1], device=flat.device)
        values += flat.index_select(0, index).float().cpu().tolist()
    total = sum(p.numel() for _, p in parameters)
    return {"parameters": total, "values": [float(f"{v:.6g}") for v in values]}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two fingerprints are of the same weights, up to half precision."""
    if one["parameters"] != other["parameters"] or len(one["values"]) != len(other["values"]):
        return False
    pairs = zip(one["values"], other["values"], strict=True)
    return all(abs(a - b) <= 2**-7 * max(abs(a), abs(b)) + 1e-6 < math.inf for a, b in pairs)


def versions() -> dict[str, Any]:
    """What the file was made with: plain facts, no time, so that equal runs give equal bytes."""
    return {
        "tenuto": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
