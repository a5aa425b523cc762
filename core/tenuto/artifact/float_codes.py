"""Codes of 8-bit floats: in a file of their own type, F8_E4M3, in memory the bytes that they are.

So a file tells other programs what its codes are, and nothing here asks torch for operations on
8-bit floats, of which it has few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..numerics import float8
from ..numerics.scheme import LEVELS

PARTS = {"e4m3": "qdata"} | dict.fromkeys(LEVELS, "step")  # what is in e4m3, by dtype


def in_file(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file has them: views of the same memory."""
    found = dict(tensors)
    for key in _keys(header):
        codes = found.get(key)
        if codes is not None and codes.dtype is torch.uint8:  # none where weights are compact
            found[key] = codes.view(float8.CODES)
    return found


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: views of the same memory."""
    return {
        key: float8.bits_of(value) if value.dtype is float8.CODES else value
        for key, value in tensors.items()
    }


def _keys(header: Mapping[str, Any]) -> Iterator[str]:
    """The names of all tensors of 8-bit floats."""
    yield from (f"weights/{name}" for name in _layers(header))
    for encoder, facts in header.get("encoders", {}).items():
        yield from (f"encoder/{encoder}.{name}" for name in _layers(facts))


def _layers(facts: Mapping[str, Any]) -> Iterator[str]:
    forms = {name: scheme["weight"] for name, scheme in facts.get("schemes", {}).items()}
    for name, about in facts.get("layers", {}).items():
        part = PARTS.get(forms.get(about["scheme"], {}).get("dtype"))
        if part is not None:
            yield f"{name}.{part}"
