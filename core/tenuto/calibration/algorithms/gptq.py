"""GPTQ: round a column at a time, and let the columns that are left make up for its error.

Frantar et al. 2022 (arXiv 2210.17323): for the inputs x (R, K) of a layer and A = x^T x, with U the
upper Cholesky factor of A^-1, column j is rounded and its error e_j = (w_j - q_j) / U_jj goes on as
    w_k -= e_j U_jk   for k > j.
Two additions. The layer is to give what it gave in full precision, y = W x, on the inputs that it
gets now, x^: the weight to be rounded is then the least-squares one, W + D A^-1 with A = x^^T x^
and D = (y - W x^)^T x^ (asymmetric calibration, Li et al. 2025, arXiv 2504.02692). And afterwards
every column is rounded again with all others fixed, a few times (cyclic descent, Behdin et al.
2023, arXiv 2309.01885): this never raises the error of V x^ to y,
    tr((V - W) A (V - W)^T) - 2 tr((V - W) D^T) + const.

A column is rounded to whatever values its format has there (`columns.py`). Where a format rotates
the columns of a weight by H, so it does A and B: the inputs of the rotated weight are x H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...model import private_copy
from ...numerics import Format, Grid, QTensor, Scheme
from ...numerics.rotation import both, butterfly, rotated, size_for
from ...sampling import processes
from ..bank import Bank
from ..columns import Columns, columns_of
from ..compensation import Factor, compensated, descended, gram_of, mirrored, slope_of
from ..moments import CHUNK, InputsSeen, over, patches, shared_inputs
from . import Effort
from .nearest import RoundToNearest, weight_of


@dataclass(frozen=True)
class GPTQ:
    """Layer by layer in the order of the block, each on what the layers before it now give.

    rows: of the bank that are used. damping: share of A's mean diagonal that is added to it; it
    draws the weight to the full-precision one where the inputs say nothing. sweeps: of cyclic
    descent. asymmetric: aim at the outputs of the full-precision block.
    """

    rows: int = 256
    damping: float = 0.1
    sweeps: int = 2
    asymmetric: bool = True

    name: ClassVar[str] = "gptq"
    stage: ClassVar[str] = "reconstruct"
    together: ClassVar[bool] = True
    needs_inputs = True
    needs_target = False

    @classmethod
    def at(cls, effort: Effort) -> GPTQ:
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
        """The weights of `layers`; there is no `target`.

        before: what they are so far, by name: their ranges and scales of columns stay. Of weights
        to nearest those are what would be searched for.
        """
        device = next(block.parameters()).device
        whole, block, done = block, private_copy(block), 0
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(bank), generator=draw)[: bank.enough(self.rows)].sort().values
        found: dict[str, QTensor] = {}
        for group in shared_inputs(block, list(layers), bank, device):
            if on_progress:
                on_progress(done, len(layers), "compensating")
            moments = self._moments(whole, block, group, bank, rows, device, bool(found))
            done += len(group)
            if moments is None:
                continue  # none of these rows came to it
            gram, gaps = moments
            known: dict[tuple[int, int], Factor] = {}

            def rounded(name: str) -> dict[str, Tensor]:
                weight, form = weight_of(whole, name), layers[name].weight
                gap = gaps.get(name)  # noqa: B023
                start = None if before is None else before[name]
                return self.weight(weight, form, gram, gap, known, start).tensors(name)  # noqa: B023

            for name, made in zip(group, processes().each(group, rounded), strict=True):
                layer: Any = block.get_submodule(name)
                found[name] = QTensor.from_tensors(
                    made, name, layer.weight.shape, layers[name].weight
                )
                layer.weight.data.copy_(found[name].dequantize())
        never = {name: scheme for name, scheme in layers.items() if name not in found}
        plain = RoundToNearest()(whole, never) if before is None else before
        return {n: found.get(n) or plain[n] for n in layers}  # some the block does not call

    def _moments(
        self,
        whole: nn.Module,
        block: nn.Module,
        group: Sequence[str],
        bank: Bank,
        rows: Tensor,
        device: Any,
        changed: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """A (G, K, K) of the inputs that the layers share, and D (G, N / G, K) of each.

        changed: whether anything of `block` is other than in `whole`: else D is 0.

        None where no input came; no D where it is 0. What tokens an expert gets, the quantized gate
        decides: where the two blocks' inputs are not the same tokens, it aims at its own outputs on
        its own inputs.
        """
        first, name = whole.get_submodule(group[0]), group[0]
        gram: Any = None
        gaps: dict[str, Any] = dict.fromkeys(group, 0.0)
        now = InputsSeen(block, [name], bank, rows, device)
        paired_up = self.asymmetric and changed
        was = InputsSeen(whole, [name], bank, rows, device) if paired_up else None
        paired = Paired() if paired_up else None

        def products(index: Tensor) -> tuple[list[int], Tensor | None, dict[str, Tensor]]:
            """Of a chunk of rows: tokens in both blocks, and its shares of A and D."""
            new, old = now(index).get(name), None if was is None else was(index).get(name)
            tokens = [0 if x is None else x.shape[:-1].numel() for x in (new, old)]
            if new is None:
                return tokens, None, {}
            x = patches(first, new)  # (G, R, K)
            lost = patches(first, old) - x if old is not None and tokens[0] == tokens[1] else None
            share = _roots(bank, index, new, x.shape[1])
            if share is not None:
                x, lost = x * share, None if lost is None else lost * share
            if bank.counted is not None:  # tokens that do not count are zeros
                kept = (x != 0).any(-1).any(0)
                x, lost = x[:, kept], None if lost is None else lost[:, kept]
            if lost is None or not paired:
                return tokens, gram_of(x), {}
            weights = {n: _by_group(weight_of(whole, n), len(x)) for n in group}
            return tokens, gram_of(x), {n: (lost @ w.mT).mT @ x for n, w in weights.items()}

        shares = processes().each(bank.parts(rows, CHUNK), products)
        for index, (tokens, part, parts) in zip(bank.parts(rows, CHUNK), shares, strict=True):
            if paired is not None:
                paired.note(len(index), *tokens, length=bank.length(index))
            if part is None:
                continue
            gram = part if gram is None else gram.add_(part)
            for n, t in parts.items() if paired else ():
                gaps[n] = gaps[n].add_(t) if isinstance(gaps[n], Tensor) else t
        some = {n: t for n, t in gaps.items() if isinstance(t, Tensor)} if paired else {}
        return None if gram is None else (mirrored(gram), some)

    def weight(
        self,
        weight: Tensor,
        form: Format,
        gram: Tensor,
        gap: Tensor | None = None,
        known: dict[tuple[int, int], Factor] | None = None,
        start: QTensor | None = None,
    ) -> QTensor:
        """One weight (N, ...) given A (G, K, K) and D (G, N / G, K); no D: 0.

        known: what other layers with the same A, and the same scale of each column, have made of
        it; it is added to. start: whose ranges and scales of columns it keeps.
        """
        channel, shape, groups = None if start is None else start.channel, weight.shape, len(gram)
        grid = Grid.of(weight, form) if start is None else start.grid(form)
        if channel is not None:  # W s is rounded, for inputs over s
            weight = (weight.flatten(1) * channel).view(shape)
            gap = None if gap is None else gap / channel
        columns, rows = weight.shape[1:].numel(), len(weight) // groups
        size = size_for(columns) if form.rotate else 0
        values = columns_of(grid, columns)
        known = {} if known is None else known
        levels = []
        for at, w in enumerate(_by_group(weight, groups).float()):
            if (at, size) not in known:
                a = gram[at] if channel is None else over(gram[at], channel)
                known[at, size] = Factor.of(both(a, size), self.damping)
            d = None if gap is None else rotated(gap[at], size)
            some = values.rows(slice(at * rows, (at + 1) * rows))
            levels.append(self.rounded(butterfly(w, size), d, known[at, size], some))
        return QTensor.of(torch.cat(levels).view(shape), grid, channel)

    def rounded(self, weight: Tensor, gap: Tensor | None, of: Factor, grid: Columns) -> Tensor:
        """Levels (N, K) of a weight (N, K). gap: D (N, K)."""
        weight, grid = weight[:, of.order], grid.at(of.order)
        shift = None if gap is None or not gap.any() else of.solved(gap[:, of.order].float())
        values, errors = compensated(weight, of.root, grid, shift)
        del weight, shift
        if self.sweeps:
            slope = slope_of(errors, of.root)
            values = descended(values, slope, of.gram, grid, self.sweeps)
        return grid.levels(values)[:, of.order.argsort()]


class Paired:
    """Whether two blocks' inputs of a layer have been the same tokens.

    So they are where every row has as many of them, or texts of several lengths as many a token.
    """

    def __init__(self) -> None:
        self.first: tuple[float, int] | None = None  # of a row, and its length
        self.same = self.by_row = self.by_token = True

    def note(self, rows: int, one: int, other: int, *, length: int) -> None:
        """One chunk of `rows` rows with so many tokens; 0: the layer was not called."""
        share = one / rows
        self.first = self.first or (share, length)
        self.same &= one == other and share == int(share)
        self.by_row &= share == self.first[0]
        self.by_token &= share * self.first[1] == self.first[0] * length

    def __bool__(self) -> bool:
        return self.same and (self.by_row or self.by_token)


def _roots(bank: Bank, index: Tensor, given: Tensor, tokens: int) -> Tensor | None:
    """The roots of what the `tokens` of a layer's input count (tokens, 1); None: all the same.

    given: that input, of the rows `index`. What an expert gets does not say whose it is.
    """
    if bank.weights is None or not (bank.calls or len(given) == len(index)):
        return None
    found = bank.weights[index.cpu()].to(given.device).sqrt()
    return found.repeat_interleave(tokens // len(found))[:, None]


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """A weight (N, ...) as (G, N / G, K)."""
    return weight.detach().flatten(1).unflatten(0, (groups, -1))
