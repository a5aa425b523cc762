"""AWQ: columns that see large inputs are rounded more finely.

Lin et al. 2023 (arXiv 2306.00978): the columns of a weight are multiplied by s before rounding and
divided by it afterwards,
    W^ = Q(W diag(s)) diag(s)^-1,   s = mean|x|^r.
Of r = 0, 1/20, ... 19/20 that one is taken with which the block's outputs on all recorded inputs
are nearest to those in full precision, token by token: what follows normalises them. Layers with
one input share s, so that it can be folded into what comes before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...model import private_copy
from ...numerics import Format, Grid, QTensor, Scheme
from ..bank import Bank
from ..moments import inputs_seen, patches, shared_inputs
from ..replay import token_error
from . import Effort
from .nearest import weight_of


@dataclass(frozen=True)
class AWQ:
    """Layer by layer in the order of the block, each on what the layers before it now give.

    Only a `smooth` format of weights can have an s; others are rounded to nearest. rows: of the
    bank that are used. ratios: how many r.
    """

    rows: int = 256
    ratios: int = 20

    name: ClassVar[str] = "awq"
    stage: ClassVar[str] = "transform"
    parts: ClassVar[tuple[str, ...]] = ("encoder",)
    smooth: ClassVar[bool] = True
    needs_inputs = True

    @classmethod
    def at(cls, effort: Effort) -> AWQ:
        """On as many rows of the bank as `effort` has."""
        return cls(rows=effort.rows)

    @torch.no_grad()
    def __call__(
        self,
        block: nn.Module,
        layers: dict[str, Scheme],
        bank: Bank,
        target: Tensor,
        *,
        seed: int = 0,
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> dict[str, QTensor]:
        """The weights of `layers`, with which the block is to give `target` (R, ...) on `bank`."""
        device = next(block.parameters()).device
        block, done = private_copy(block), 0
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(bank), generator=draw)[: bank.enough(self.rows)].sort().values
        forms = {name: scheme.weight for name, scheme in layers.items()}
        found = {  # what the block never calls stays like that
            name: rounded(weight_of(block, name), forms[name], torch.ones((), device=device))
            for name in layers
        }

        def error(tried: dict[str, QTensor]) -> float:
            for name, q in tried.items():
                _put(block, name, q)
            return token_error(block, bank, rows, target, device)

        for group in shared_inputs(block, list(layers), bank, device):
            size = mean_size(block, group[0], bank, rows, device)
            weights = {name: weight_of(block, name).clone() for name in group}
            best, least = {}, math.inf
            for place, tried in enumerate(self._candidates(weights, forms, size)):
                if on_progress:
                    total = self.ratios
                    on_progress(done * total + place, total * len(layers), "scaling")
                wrong = error(tried)
                if wrong < least:
                    best, least = tried, wrong
            for name, q in best.items():
                _put(block, name, q)
            found |= best
            done += len(group)
        return found

    def _candidates(
        self, weights: dict[str, Tensor], forms: dict[str, Format], size: Tensor | None
    ) -> Iterator[dict[str, QTensor]]:
        """Layers that share an input, with every s. size: mean |x| (K,), if they have seen any."""
        able = size is not None and all(forms[n].smooth for n in weights)
        for step in range(self.ratios if able else 1):
            s = torch.ones(1) if size is None else scale_of(size, step / self.ratios)
            yield {n: rounded(w, forms[n], s.to(w.device)) for n, w in weights.items()}


def mean_size(block: nn.Module, name: str, bank: Bank, rows: Tensor, device: Any) -> Tensor | None:
    """The mean |x| (K,) of what the layer sees, a Conv2d's groups as one; None: it sees nothing."""
    size, count = torch.zeros((), device=device), 0
    layer = block.get_submodule(name)
    for seen in inputs_seen(block, [name], bank, rows, device):
        if name in seen:
            x = patches(layer, seen[name]).flatten(0, 1).float()
            size, count = size + x.abs().sum(0), count + len(x)
    return size / count if count else None


def scale_of(size: Tensor, ratio: float) -> Tensor:
    """s (K,) of mean |x| (K,) and r, of a geometric mean of 1 between its ends."""
    s = size.pow(ratio).clamp_min(1e-4)
    return s / (s.max() * s.min()).sqrt()


def rounded(weight: Tensor, form: Format, scale: Tensor) -> QTensor:
    """A weight (N, ...) times `scale` (K,) on the grid nearest to it, where `form` has a scale."""
    value = weight.detach().float()
    if not form.smooth:
        grid = Grid.of(value, form)
        return QTensor.of(grid.nearest(value), grid)
    rows = value.flatten(1)
    scale = scale.float().expand(rows.shape[1]).contiguous()
    grid = Grid.of((rows * scale).view(weight.shape), form)
    return QTensor.of(grid.nearest((rows * scale).view(weight.shape)), grid, scale)


def _put(block: nn.Module, name: str, q: QTensor) -> None:
    layer: Any = block.get_submodule(name)
    layer.weight.data.copy_(q.dequantize())
