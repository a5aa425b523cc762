"""AdaRound: learn whether each weight rounds down or up, block by block.

Nagel et al. 2020 (arXiv 2004.10568), as BRECQ and TFMQ-DM use it (arXiv 2311.16503):
    v = clip(1.2 sigmoid(a) - 0.1, 0, 1),  w_int = floor(w / s) + v,
    L = |target - block(x)|^2 + weight * sum(1 - |2 v - 1|^c),  c from 20 to 2 after the warm-up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import SchemeError
from ...model import override_, tensors_in
from ...numerics import Format, Grid, QTensor, Scheme
from ..bank import Bank
from ..replay import first_tensor, outputs
from . import Effort
from .gptq import GPTQ
from .nearest import weight_of

STRETCH, SHIFT = 1.2, -0.1


class Rounding:
    """The rounding of one weight: soft while it is learnt, hard at the end.

    start: levels (N, ...) from which it goes up or down, towards the weight; else the weight's own
    neighbours.
    """

    def __init__(self, weight: Tensor, form: Format, start: Tensor | None = None) -> None:
        w = weight.detach().float()
        if form.rotate:
            raise SchemeError("A rotated weight is rounded to nearest or by GPTQ.")
        self.grid = Grid.of(w, form)
        columns = w.shape[1:].numel()
        self.size = self.grid.size(columns).view(w.shape)
        self.low, self.high = (t.view(w.shape) for t in self.grid.limits(columns))
        exact = w / self.size
        self.floor = exact.floor() if start is None else start - (exact < start).float()
        share = (exact if start is None else start) - self.floor
        share = share.clamp(0.01, 0.99)
        alpha = torch.log((share - SHIFT) / (STRETCH + SHIFT - share))
        self.alpha = alpha.requires_grad_(True)
        self.up, self.soft = share, w  # as they are in the step that is being taken

    def soften(self) -> None:
        """Set `up`, v of the paper (0 rounds down, 1 up), and the weight that it stands for."""
        self.up = torch.sigmoid(self.alpha).mul(STRETCH).add(SHIFT).clamp(0, 1)
        self.soft = (self.floor + self.up).clamp(self.low, self.high) * self.size

    def qtensor(self) -> QTensor:
        """The weight with every decision made."""
        up = (self.alpha.detach() >= 0).float()
        return QTensor.of((self.floor + up).clamp(self.low, self.high), self.grid)


@dataclass(frozen=True)
class AdaRound:
    """Rounding learnt by Adam on recorded inputs of the block.

    iterations, batch: optimizer steps and rows in each. lr: of Adam on the rounding alone.
    weight: of the rounding term, per weight. warmup: share of iterations without it.
    start: "nearest", or "gptq" to go on from what GPTQ found (`asymmetric` as here).
    asymmetric: aim at what the full-precision block gave on its own inputs; else at what it gives
    on those that the quantized block gets.
    """

    iterations: int = 400
    batch: int = 32
    lr: float = 1e-2
    weight: float = 0.01
    warmup: float = 0.2
    start: str = "nearest"
    asymmetric: bool = True

    name: ClassVar[str] = "adaround"
    even: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("denoiser",)
    needs_inputs = True

    @classmethod
    def at(cls, effort: Effort) -> AdaRound:
        """With the iterations and the batch of `effort`."""
        return cls(effort.iterations, effort.batch)

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
        """The weights of `layers`, rounded so that the block gives `target` (R, ...) on `bank`."""
        device = next(block.parameters()).device
        roundings = self._started(block, layers, bank, seed, on_progress)
        if not self.asymmetric:
            target = outputs(block, bank, device)
        patches = [
            override_(block.get_submodule(n), with_soft_weight(r)) for n, r in roundings.items()
        ]
        optimizer = torch.optim.Adam([r.alpha for r in roundings.values()], lr=self.lr)
        fit = _Fit(self, block, bank, target, list(roundings.values()))
        draw = torch.Generator().manual_seed(seed)
        try:
            for step in range(self.iterations):
                if on_progress:
                    on_progress(step, self.iterations, "rounding")
                size = (bank.enough(self.batch),)
                index = torch.randint(len(bank), size, generator=draw)
                with torch.enable_grad():  # the caller may well be in no_grad
                    fit.gradients(index, step)
                optimizer.step()
        finally:
            for patch in patches:
                patch.remove()
        return {n: r.qtensor() for n, r in roundings.items()}

    def _started(
        self,
        block: nn.Module,
        layers: dict[str, Scheme],
        bank: Bank,
        seed: int,
        on_progress: Callable[[int, int, str], None] | None,
    ) -> dict[str, Rounding]:
        """A rounding of every layer."""
        first: dict[str, QTensor] = {}
        if self.start == "gptq":
            first = GPTQ(asymmetric=self.asymmetric)(
                block, layers, bank, seed=seed, on_progress=on_progress
            )
        start = {n: q.levels().float() for n, q in first.items()}
        return {n: Rounding(weight_of(block, n), s.weight, start.get(n)) for n, s in layers.items()}

    def exponent(self, step: int) -> float | None:
        """c of the paper at `step`: none in the warm-up, then 20 falling to 2."""
        start = self.warmup * self.iterations
        if step < start:
            return None
        return 20 - 18 * (step - start) / max(1.0, self.iterations - start)


@dataclass
class _Fit:
    """A block with soft weights, its inputs and what it is to give.

    parts: in how many a batch is taken; more where memory was short.
    """

    method: AdaRound
    block: nn.Module
    bank: Bank
    target: Tensor
    roundings: list[Rounding]
    parts: int = 1

    def gradients(self, index: Tensor, step: int) -> None:
        """Gradients of the loss on the rows `index`."""
        while True:
            try:
                return self._backward(index, self.method.exponent(step))
            except torch.cuda.OutOfMemoryError:
                if self.parts >= len(index):
                    raise
                self.parts *= 2

    def _backward(self, index: Tensor, exponent: float | None) -> None:
        for rounding in self.roundings:
            rounding.alpha.grad = None
        size = -(-len(index) // self.parts)
        for place, rows in enumerate(self.bank.parts(index, size)):
            loss = self._error(rows) * len(rows) / len(index)
            if place == 0 and exponent is not None:
                for rounding in self.roundings:
                    sure = (2 * rounding.up - 1).abs()
                    loss = loss + self.method.weight * (1 - sure.pow(exponent)).sum()
            loss.backward()

    def _error(self, rows: Tensor) -> Tensor:
        """How far the block is off on some rows."""
        device = next(self.block.parameters()).device
        for rounding in self.roundings:
            rounding.soften()
        args, kwargs = self.bank.rows(rows, device)
        wanted = self.bank.of(self.target, rows).to(device)
        gap = (first_tensor(self.block(*args, **kwargs)) - wanted).pow(2).sum(1)
        if self.bank.weights is not None:
            share = self.bank.weights[rows].to(gap)
            gap = gap * (share if self.bank.calls else share.view(-1, *[1] * (gap.ndim - 1)))
        return gap.mean()


def with_soft_weight(layer: Any) -> Callable[..., Tensor]:
    """A layer's forward with the weight that is `layer.soft` in that call."""

    def forward(original: Callable[..., Tensor], module: Any, *args: Any, **named: Any) -> Tensor:
        x = next(tensors_in((args, named)))
        if isinstance(module, nn.Conv2d):
            return module._conv_forward(x, layer.soft, module.bias)
        return F.linear(x, layer.soft, module.bias)

    return forward
