"""Clipping searched on recorded inputs: the ends of a range that cost the layer's output least.

The search of AWQ (Lin et al. 2023, arXiv 2306.00978) as LLMC generalises it to ranges with a zero
point (Gong et al. 2024, arXiv 2405.06001): of each range of a row, all else left alone,
    min over [low, high] of sum over tokens of (x_g . (w_g - Q(w_g; low, high)))^2,
first both ends at the same share of it, 1, 0.95, ... 0.55, then each alone. With A = x^T x of
the columns g that error is d A d^T, d = w_g - Q(w_g), whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...model import private_copy
from ...numerics import Format, Grid, QTensor, Scheme, affine
from ..bank import Bank
from ..moments import over, seen_gram, shared_inputs
from ..ranges import in_groups, kept, lower, nearest, rounded, scaled, searchable, sizes, started
from . import Effort
from .nearest import weight_of


@dataclass(frozen=True)
class Clip:
    """Layer by layer in the order of the block, each on what the layers before it now give.

    rows: of the bank that are used. levels: how many shares, `step` apart. apart: whether each end
    is searched alone too. Formats of whole codes that are not rotated can be clipped; others stay.
    """

    rows: int = 256
    levels: int = 10
    step: float = 0.05
    apart: bool = True

    name: ClassVar[str] = "clip"
    stage: ClassVar[str] = "clip"
    even: ClassVar[bool] = True
    needs_inputs = True
    needs_target = False

    @classmethod
    def at(cls, effort: Effort) -> Clip:
        """On as many rows of the bank as `effort` has."""
        return cls(rows=effort.rows)

    @torch.no_grad()
    def __call__(
        self,
        block: nn.Module,
        layers: dict[str, Scheme],
        bank: Bank,
        target: Tensor | None = None,
        *,
        before: Mapping[str, QTensor] | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> dict[str, QTensor]:
        """The weights of `layers`; before: what they are so far, by name."""
        device = next(block.parameters()).device
        block = private_copy(block)
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(bank), generator=draw)[: bank.enough(self.rows)]
        found = {n: started(weight_of(block, n), s.weight, before, n) for n, s in layers.items()}
        able = [name for name, scheme in layers.items() if searchable(scheme.weight)]
        done = 0
        for group in shared_inputs(block, list(layers), bank, device):
            if on_progress:
                on_progress(done, len(layers), "clipping")
            done += len(group)
            gram = seen_gram(block, group[0], bank, rows, device)
            for name in group:
                weight = weight_of(block, name)
                if gram is not None and name in able:
                    found[name] = self.weight(weight, layers[name].weight, gram, found[name])
                weight.data.copy_(found[name].dequantize())
        return found

    def weight(self, weight: Tensor, form: Format, gram: Tensor, start: QTensor) -> QTensor:
        """One weight (N, ...) given A (G, K, K) of its inputs, from the ranges of `start`."""
        if start.channel is not None:  # inputs are divided by it
            gram = over(gram, start.channel)
        grid, groups = start.grid(form), in_groups(scaled(weight, start), form)
        count, found = len(groups) // len(gram), list[Grid]()
        for place, moments in enumerate(gram):
            some = slice(place * count, (place + 1) * count)
            step = None if grid.step is None else grid.step[some]
            own = Grid(grid.scale[some], grid.zero[some], step, form)
            found.append(self._searched(groups[some], _diagonal(moments, groups), own))
        step = (
            None if grid.step is None else torch.cat([g.step for g in found if g.step is not None])
        )
        scale, zero = torch.cat([g.scale for g in found]), torch.cat([g.zero for g in found])
        return rounded(weight, start, Grid(scale, zero, step, form))

    def _searched(self, groups: Tensor, gram: Tensor, start: Grid) -> Grid:
        """The grid of ranges (N, G, g). gram: A of the columns of each, (G, g, g)."""
        form = start.form

        def cost(size: Tensor, zero: Tensor) -> Tensor:
            gap = groups - nearest(groups, size, zero, form) * size[..., None]
            product = (gap.transpose(0, 1) @ gram).transpose(0, 1)
            return product.mul_(gap).sum(-1)

        low, high = groups.amin(-1), groups.amax(-1)
        one = torch.ones_like(low)
        best: Any = (
            cost(sizes(start), start.zero),
            sizes(start).expand_as(low),
            start.zero,
            one,
            one,
        )
        best = self._tried(best, cost, low, high, form, ((s, s) for s in self._shares()))
        if self.apart and not form.symmetric:
            both = best[3]
            best = self._tried(best, cost, low, high, form, ((s, both) for s in self._shares()))
            first = best[3]
            best = self._tried(best, cost, low, high, form, ((first, s) for s in self._shares()))
        return kept(best[1], best[2], start, cost)

    def _shares(self) -> Iterator[float]:
        return (1 - self.step * place for place in range(self.levels))

    def _tried(
        self, best: Any, cost: Any, low: Tensor, high: Tensor, form: Format, pairs: Iterator[Any]
    ) -> Any:
        """The best of (cost, size, zero, share of low, share of high) with some more shares."""
        for one, other in pairs:
            size, zero = affine(low * one, high * other, form.bits, form.symmetric)
            shares = (torch.as_tensor(s).expand_as(low) for s in (one, other))
            best = lower(best, (cost(size, zero), size, zero, *shares))
        return best


def _diagonal(gram: Tensor, groups: Tensor) -> Tensor:
    """The blocks of A (K, K) that belong to ranges (N, G, g): (G, g, g)."""
    count, size = groups.shape[1:]
    short = count * size - len(gram)
    wide = torch.nn.functional.pad(gram, (0, short, 0, short))
    places = torch.arange(count, device=gram.device)
    return wide.view(count, size, count, size)[places, :, places]
