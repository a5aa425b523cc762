"""Which kernel, or float? Decided by timing them, once for layers that are alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import TenutoError
from .kept_choices import KeptChoices
from .kernels import Kernel
from .kernels.fp8_linear import Float8Linear
from .kernels.int8_linear import IntLinear
from .kernels.joint_linear import lay
from .kernels.quantize_input import compiling
from .mode import EAGER, Mode
from .timing import latency

EXECUTIONS = ("auto", "int8", "float")
INT8, DENSE = "int8", "dequantized"


@dataclass
class Chooser:
    """Chooses for a kind of layer, and answers alike whenever the same kind is asked for again.

    margin: how many times slower than float the fastest kernel must be to be left: it has the
    smaller weights. gpu_margin: the same on a GPU, where a whole model is as slow as its layers,
    and where a choice is kept: a kernel as fast as float is not left for the noise of one timing.
    mode: how the layers will run. kept: choices that earlier processes made on a GPU.
    """

    margin: float = 1.15
    repeats: int = 5
    known: dict[Hashable, str] = field(default_factory=dict)
    gpu_margin: float = 1.02
    mode: Mode = EAGER
    kept: KeptChoices | None = None

    def __call__(self, kind: Hashable, runs: Mapping[str, Callable[[], Any]]) -> str:
        """The name of a kernel in `runs`, or `DENSE`, by medians of runs in turn.

        A kind that has a `torch.device` of CUDA among its parts is timed there.
        """
        if kind not in self.known:
            card = card_of(kind)
            name = (self.kept.get(self.mode, kind, card) if self.kept and card else None) or ""
            if name not in runs:
                name = self._fastest(runs, self.gpu_margin if card else self.margin)
                if self.kept and card:
                    self.kept.add(self.mode, kind, card, name)
            self.known[kind] = name
        return self.known[kind]

    def _fastest(self, runs: Mapping[str, Callable[[], Any]], margin: float) -> str:
        found = latency(dict(runs), self.repeats, warmup=2)
        low = min((name for name in runs if name != DENSE), key=lambda n: found[n].median)
        return DENSE if found[low].median > margin * found[DENSE].median else low

    def __deepcopy__(self, memo: dict[int, Any]) -> Chooser:
        return self  # a copy of a model decides as the model does


def card_of(kind: Hashable) -> torch.device | None:
    """The device of CUDA that a kind of layer is on; None: it is on none."""
    parts = kind if isinstance(kind, tuple) else ()
    places = (part for part in parts if isinstance(part, torch.device))
    return next((place for place in places if place.type == "cuda"), None)


def decide(layer: Any, able: tuple[Kernel, ...], key: tuple[Any, ...], x: Tensor) -> None:
    """Let a layer, and those that share its input, take what is fastest for them together.

    able: the kernels that take the layer. key: what `QLayer.choices` knows such inputs by.
    """
    found = [one for one in layer.siblings if one._candidates(x.dtype) == able]
    group = found if len(found) > 1 else [layer]
    together = tuple(one.shape for one in group)

    def run(kernel: Kernel | None, x: Tensor) -> Any:
        x = x.detach()  # a tensor that no memo knows
        made = [one.by(kernel, x) for one in group]
        if kernel is not None and len(group) > 1 and x.is_cuda and not compiling():
            lay_together([one._packed[kernel.name] for one in group], group)
        return made if len(group) > 1 else made[0]

    runs = {kernel: functools.partial(run, kernel) for kernel in (*able, None)}
    kind = (*layer.kind(), *((together,) if len(group) > 1 else ()), *key)
    kernel = decided(layer.chooser, kind, runs, x)
    for one in group:
        one.take(key, kernel)


def lay_together(packed: Sequence[Any], layers: Iterable[Any]) -> None:
    """Packed weights of layers side by side in memory, if they are of a kind that can lie so."""
    for kind in (Float8Linear, IntLinear):
        same = all(isinstance(p, kind) for p in packed)
        if same and len({p.weight.shape[0] for p in packed}) == 1 and lay(packed):
            for layer in layers:
                layer.packings += 1


def decided(
    chooser: Any, kind: tuple[Any, ...], runs: Mapping[Kernel | None, Callable[[Tensor], Any]],
    x: Tensor,
) -> Kernel | None:  # fmt: skip
    """The kernel of `runs` that `chooser` takes for `x`, or None, the float layer.

    A chooser may say "int8" instead of a name: the first one. It is asked for `kind`, the device
    of `x`, the number of threads where these compute, and the names.
    """
    where = (x.device,) if x.device.type == "cuda" else (x.device, torch.get_num_threads())
    mode = getattr(chooser, "mode", EAGER)
    by_name = {kernel.name: kernel for kernel in runs if kernel is not None}
    named = {kernel.name if kernel else DENSE: mode.run(run, x) for kernel, run in runs.items()}
    with torch.no_grad():
        name = chooser((*kind, *where, *by_name), named)
    return None if name == DENSE else by_name.get(name, next(iter(by_name.values())))


def rows_of(x: Tensor, width: int) -> tuple[int, torch.dtype]:
    """What a choice is known by: about how many rows of `width` values `x` has, and its dtype."""
    return (x.numel() // width).bit_length(), x.dtype


def word(kernel: Kernel | None) -> str:
    """What a layer says of itself that computes with a kernel, or in float."""
    return DENSE if kernel is None else kernel.word


def may_measure(x: Tensor) -> bool:
    """Not while a graph is made of the calls."""
    if compiling():
        return False
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


process = Chooser(kept=KeptChoices())  # what this process has found out
_choosers = {process.mode: process}


def chooser_for(mode: Mode) -> Chooser:
    """What this process has found out of layers that run so."""
    return _choosers.setdefault(mode, Chooser(mode=mode, kept=process.kept))


def check_execution(execution: str) -> None:
    """Raise TenutoError unless it is "auto", "int8" or "float"."""
    if execution not in EXECUTIONS:
        choices = ", ".join(EXECUTIONS)
        raise TenutoError(f"Unknown execution {execution!r}: choose one of {choices}.")
