"""What a layout is, and what the files of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import SchemeError
from ..qtensor import QTensor
from ..scheme import Format

Tensors = Mapping[str, Tensor]
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """See the package. shape: (N, K) of the weight."""

    format: str
    takes: Callable[[Format], bool]
    pack: Callable[[QTensor], dict[str, Tensor]]
    facts: Callable[[QTensor], dict[str, Any]]
    unpack: Callable[[Tensors, Facts, Any, Format], QTensor]
    decode: Callable[[Tensors, Facts, Any], Tensor]


def taken(tensors: Tensors, name: str, dtype: torch.dtype, shape: Any) -> Tensor:
    """The tensor called `name`; SchemeError unless it is of this type and shape."""
    found = tensors.get(name)
    if found is None:
        raise SchemeError(f"A quantized layer lacks its {name}.")
    if found.dtype is not dtype or tuple(found.shape) != tuple(shape):
        said = f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
        raise SchemeError(f"The {name} of a quantized layer does not fit it: {said}.")
    return found


def number(facts: Facts, name: str, usual: int) -> int:
    """A whole number of a layer's facts, at least 1."""
    found = facts.get(name, usual)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise SchemeError(f"A quantized layer has no such {name}: {found!r}.")
    return found


def rotation(facts: Facts, usual: int, columns: int) -> int:
    """The size of a layer's rotated groups; SchemeError unless a reader takes it."""
    found = number(facts, "convrot_groupsize", usual)
    if found < 4 or found & (found - 1) or not found.bit_length() % 2 or columns % found:
        raise SchemeError(f"A rotation of {found} columns does not fit {columns}.")
    return found
