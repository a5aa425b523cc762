"""Int8 or float? Decided by timing both, once for layers that are alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import TenutoError
from .kernels.quantize_input import compiling
from .timing import latency

EXECUTIONS = ("auto", "int8", "float")
INT8, DENSE = "int8", "dequantized"


@dataclass
class Chooser:
    """Chooses for a kind of layer, and answers alike whenever the same kind is asked for again.

    margin: how many times slower int8 must be to be left: it has the smaller weights.
    """

    margin: float = 1.15
    repeats: int = 5
    known: dict[Hashable, str] = field(default_factory=dict)

    def __call__(self, kind: Hashable, int8: Callable[[], Any], dense: Callable[[], Any]) -> str:
        """`INT8` or `DENSE`, by medians of runs in turn."""
        if kind not in self.known:
            found = latency({INT8: int8, DENSE: dense}, self.repeats, warmup=2)
            slower = found[INT8].median > self.margin * found[DENSE].median
            self.known[kind] = DENSE if slower else INT8
        return self.known[kind]

    def __deepcopy__(self, memo: dict[int, Any]) -> Chooser:
        return self  # a copy of a model decides as the model does


def may_measure(x: Tensor) -> bool:
    """Not while a graph is made of the calls."""
    if compiling():
        return False
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


process = Chooser()  # what this process has found out


def check_execution(execution: str) -> None:
    """Raise TenutoError unless it is "auto", "int8" or "float"."""
    if execution not in EXECUTIONS:
        choices = ", ".join(EXECUTIONS)
        raise TenutoError(f"Unknown execution {execution!r}: choose one of {choices}.")
