"""Temporal tables as curves in int8: how a file has them, and their rows for who attaches it.

Output I of a module is then three tensors: `temporal/MODULE.I`, int8 (R, ...), with `.scale`, fp32
(R,), and `.mix`, fp16 (T, R), beside it (`numerics/curves.py`). A table of rows is one of floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..numerics import Curves, half

if TYPE_CHECKING:
    from .artifact import Artifact

START = "temporal/"
MOST = 4  # curves a step, at the most: as many as steps are exact but for rounding
BESIDE = (".scale", ".mix")  # what such a table has beside its codes


def in_curves(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one of the tables in `tensors`, "section/name", is of curves."""
    return any(_coded(key, value) for key, value in tensors.items())


def with_rows(artifact: Artifact) -> Artifact:
    """`artifact` with its tables in rows, as `attach` reads them; itself where all are."""
    if not in_curves(artifact.tensors):
        return artifact
    tensors = dict(artifact.tensors)
    for key in [key for key, value in tensors.items() if _coded(key, value)]:
        tensors[key] = half(Curves.from_tensors(tensors, key).rows())
        for end in BESIDE:
            del tensors[key + end]
    facts = artifact.header["temporal"]
    modules = {
        name: {key: value for key, value in about.items() if key != "curves"}
        for name, about in facts["modules"].items()
    }
    header = artifact.header | {"temporal": facts | {"modules": modules}}
    return replace(artifact, header=header, tensors=tensors)


def parts_needed(key: str, codes: Tensor, steps: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Type and shape of each tensor of a table whose codes are `codes`; ValueError: it is none."""
    count = len(codes) if codes.ndim else 0
    if not 0 < count <= MOST * steps:
        raise ValueError("no such curves")
    return {
        key: (torch.int8, (count, *shape)),
        f"{key}.scale": (torch.float32, (count,)),
        f"{key}.mix": (torch.float16, (steps, count)),
    }


def parts_of_table(values: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one output: what comes after its name -> tensor. values: of the section."""
    return {end: values[name + end] for end in ("", *BESIDE) if name + end in values}


def _coded(key: str, value: Tensor) -> bool:
    return key.startswith(START) and value.dtype is torch.int8
