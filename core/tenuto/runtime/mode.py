"""`Mode`: how a layer will run, so that what is timed is what will run.

Compiled code puts a layer's quantization into the operation before it, and a CUDA graph starts its
kernels at no cost: what is slowest in eager mode may be fastest there, and the other way round.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..text import first_line
from .captures import CudaCapture
from .compiler import backend

log = logging.getLogger("tenuto")

CALLS = 8  # of a layer on a GPU that are timed at once: waiting for it costs as much as some layers
_numbers = itertools.count()


@dataclass(frozen=True)
class Mode:
    """compile: by torch.compile, with what is before it. capture: in a CUDA graph."""

    compile: bool = False
    capture: bool = False

    def __str__(self) -> str:
        words = ["compiled"] * self.compile + ["captured"] * self.capture
        return " and ".join(words) or "eager"

    def run(self, call: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
        """What runs `call` on `x` in this mode, made ready when it runs first."""
        return _Run(self, call, x)


EAGER = Mode()


class _Run:
    """`call` on `x`, several times on a GPU."""

    def __init__(self, mode: Mode, call: Callable[[Tensor], Any], x: Tensor) -> None:
        self.mode, self.call, self.x = mode, call, x.detach()
        self.ready: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self.ready is None:
            self.ready = self._made()
        return self.ready()

    def _made(self) -> Callable[[], Any]:
        x, call = self.x, self.call
        call(x)  # in eager mode first: weights are packed, which no graph can
        if self.mode.compile:
            call = _tried(compiled(call), call, x)
        if x.device.type != "cuda":
            return lambda: call(x)

        def several() -> None:
            for _ in range(CALLS):
                call(x)

        return _captured(several, x.device) if self.mode.capture else several


def compiled(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """`call` by torch.compile, after an activation into which its first passes may go.

    Each has code of its own: torch keeps what it compiled by code, and only so many versions.
    """

    def step(x: Tensor) -> Any:
        return call(F.silu(x))

    code = step.__code__.replace(co_name=f"step_{next(_numbers)}")
    own = FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
    return torch.compile(own, dynamic=False, backend=backend())


def _tried(new: Any, old: Any, x: Tensor) -> Any:
    """`new` if it runs; else `old`, with a warning."""
    try:
        new(x)
    except Exception as error:  # of any kind: compilers have many
        said = first_line(error)
        log.warning("A layer is timed in eager mode, as it does not compile: %s.", said)
        return old
    return new


def _captured(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`call` as a CUDA graph; itself, with a warning, where it cannot be captured."""
    try:
        return CudaCapture(device)(call)[0]
    except RuntimeError as error:
        log.warning("A layer is timed without a CUDA graph: %s.", first_line(error))
        return call
