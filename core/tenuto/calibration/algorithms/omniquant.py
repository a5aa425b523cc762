"""OmniQuant's learnt clipping: the ends of all ranges of a block, learnt together on its output.

Shao et al. 2023 (arXiv 2308.13137), learnable weight clipping:
    Q(W) = clamp(round(W / h) + z, 0, 2^b - 1),  h = (a max - b min) / (2^b - 1),
    z = -round(b min / h),
where a and b of each range follow the gradient of |block(x; Q(W)) - target|^2, through round() as
if it were not there. As in LLMC (Gong et al. 2024, arXiv 2405.06001) they start from ranges that
were searched, 1 being those, and a chain may go on with other algorithms. The distance is relative,
token by token, as in `awq.py`. What the paper learns beside it, scales and shifts of columns, is
not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model import override_
from ...numerics import Format, Grid, QTensor, Scheme, ends
from ...numerics.grid import WIDEST
from ...numerics.integer_codes import TINY
from ..bank import Bank
from ..ranges import in_groups, rounded, scaled, searchable, sizes, started
from ..replay import token_gaps
from . import Effort
from .adaround import with_soft_weight
from .nearest import weight_of


@dataclass(frozen=True)
class OmniQuant:
    """Ranges learnt by Adam on recorded inputs of the block, from those that are there.

    iterations, batch: optimizer steps and rows in each. lr: of the logarithms of a and b. Ranges of
    formats that are not whole codes, or are rotated, stay; so do all of a block that gains nothing.
    """

    iterations: int = 300
    batch: int = 16
    lr: float = 0.002

    name: ClassVar[str] = "omniquant"
    stage: ClassVar[str] = "clip"
    even: ClassVar[bool] = True
    needs_inputs = True

    @classmethod
    def at(cls, effort: Effort) -> OmniQuant:
        """With the iterations and the batch of `effort`."""
        return cls(effort.iterations, effort.batch)

    @torch.no_grad()
    def __call__(
        self,
        block: nn.Module,
        layers: dict[str, Scheme],
        bank: Bank,
        target: Tensor,
        *,
        before: Mapping[str, QTensor] | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> dict[str, QTensor]:
        """The weights of `layers`, with which the block is to give `target` (R, ...) on `bank`.

        before: what they are so far, by name.
        """
        given = {n: (weight_of(block, n), s.weight) for n, s in layers.items()}
        ranges = {n: Learnt(w, f, started(w, f, before, n)) for n, (w, f) in given.items()}
        patches = [
            override_(block.get_submodule(n), with_soft_weight(r)) for n, r in ranges.items()
        ]
        able = [r for r in ranges.values() if searchable(r.form)]
        try:
            first = self._error(block, ranges, bank, target)
            if able:
                self._learn(block, able, bank, target, seed, on_progress)
            better = self._error(block, ranges, bank, target) < first
        finally:
            for patch in patches:
                patch.remove()
        return {n: r.qtensor() if better else r.start for n, r in ranges.items()}

    def _learn(
        self,
        block: nn.Module,
        ranges: list[Learnt],
        bank: Bank,
        target: Tensor,
        seed: int,
        on_progress: Callable[[int, int, str], None] | None,
    ) -> None:
        device = next(block.parameters()).device
        optimizer = torch.optim.Adam([r.ends for r in ranges], lr=self.lr)
        draw, size = torch.Generator().manual_seed(seed), (bank.enough(self.batch),)
        for step in range(self.iterations):
            if on_progress:
                on_progress(step, self.iterations, "clipping")
            index = torch.randint(len(bank), size, generator=draw).sort().values
            optimizer.zero_grad()
            with torch.enable_grad():
                for one in ranges:
                    one.soften()
                parts = bank.parts(index, len(index))
                gaps = [token_gaps(block, bank, rows, target, device).sum() for rows in parts]
                (torch.stack(gaps).sum() / len(index)).backward()
            optimizer.step()
        for one in ranges:
            one.soften()

    def _error(
        self, block: nn.Module, ranges: Mapping[str, Learnt], bank: Bank, target: Tensor
    ) -> float:
        device, rows = next(block.parameters()).device, torch.arange(len(bank))
        for one in ranges.values():
            one.soften()
        parts = bank.parts(rows, 2 * self.batch)
        return sum(float(token_gaps(block, bank, index, target, device).sum()) for index in parts)


class Learnt:
    """The ranges of one weight (N, ...), learnt from those of `start`; `soft` is what it is now.

    ends: the logarithms of a and b, fp32 (2, N, G).
    """

    def __init__(self, weight: Tensor, form: Format, start: QTensor) -> None:
        self.weight, self.form, self.start = weight.detach(), form, start
        self.soft = start.dequantize()
        if not searchable(form):
            return
        grid = start.grid(form)
        self.groups, self.columns = in_groups(scaled(weight, start), form), weight[0].numel()
        bottom, top = self.limits = ends(form)
        self.low, self.high = ((end - grid.zero) * sizes(grid) for end in (bottom, top))
        self.ends = torch.zeros(2, *self.low.shape, device=weight.device).requires_grad_(True)

    def soften(self) -> None:
        """Set `soft` to the weight rounded in the ranges as they are."""
        if not searchable(self.form):
            return
        size, zero, _, _ = self._found()
        bottom, top = (end - zero[..., None] for end in self.limits)
        levels = torch.minimum(torch.maximum(_round(self.groups / size[..., None]), bottom), top)
        rows = (levels * size[..., None]).flatten(1)[:, : self.columns]
        rows = rows if self.start.channel is None else rows / self.start.channel
        self.soft = rows.view(self.weight.shape).to(self.weight.dtype)

    def _found(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As the format keeps them: distance of values and zero (N, G), scale (N,), step (N, G)."""
        form, (bottom, top) = self.form, self.limits
        low, high = (end * share.exp() for end, share in zip(
            (self.low, self.high), self.ends, strict=True))  # fmt: skip
        if form.symmetric:
            size = (torch.maximum(-low, high) / top).clamp_min(TINY)
            zero = torch.zeros_like(size)
        else:
            size = ((high - low) / (top - bottom)).clamp_min(TINY)
            zero = _round(bottom - low / size).clamp(bottom, top)
        if not form.group:
            return size, zero, size[:, 0], None
        farthest = torch.maximum(zero - bottom, top - zero).detach()
        scale = (size * farthest).amax(1) / WIDEST
        step = _round(size / scale[:, None]).clamp_min(1)
        step = torch.minimum(step, (WIDEST / farthest).floor())
        return step * scale[:, None], zero, scale, step

    def qtensor(self) -> QTensor:
        """The weight in its ranges as they are."""
        if not searchable(self.form):
            return self.start
        with torch.no_grad():
            _, zero, scale, step = self._found()
            grid = Grid(scale.contiguous(), zero, step, self.form)
            return rounded(self.weight, self.start, grid)


def _round(x: Tensor) -> Tensor:
    """Rounded, with the gradient of what was not."""
    return x + (x.round() - x).detach()
