"""A table of steps for a run of other steps: as much reuse in every part of it, in no longer runs.

Taking the nearest row instead would reuse two thirds of three steps by a table that reuses 40 % of
twenty, and a fifth of thirty.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def resampled(table: Tensor, places: Tensor) -> Tensor:
    """`table`, bool (T, N) with True where computed, for steps at `places`: bool (n, N).

    Each column reuses the same share of its steps as before, up to whole steps of all columns
    together, where it did before, and no more steps in a row. The first step computes.
    """
    kinds, which = table.t().unique(dim=0, return_inverse=True)
    columns = [_Column(kind, places) for kind in kinds]
    found, owed = torch.ones(len(places), len(which), dtype=torch.bool), 0.0
    for number, kind in enumerate(which.tolist()):
        column = columns[kind]
        owed += column.share
        found[:, number] = computed = column.computed(max(0, round(owed)))
        owed -= int((~computed).sum())
    return found


class _Column:
    """One column: what it costs to reuse so many of its steps, and which ones are the cheapest.

    The cost of a step is age^2 over how much was reused around it, so that reuses spread evenly;
    where nothing was, far more, and the earlier the more: only if there is no other room.
    """

    def __init__(self, column: Tensor, places: Tensor) -> None:
        self.density = _density(column, places)
        self.steps, self.longest = len(places), _longest(column)
        self.share = float((~column).double().mean()) * self.steps
        most = min(self.steps - 1, math.ceil(self.share) + 1) if self.longest else 0
        self.back = []
        shape = self.longest + 1, most + 1  # (age, how many reused so far)
        best = torch.full(shape, math.inf, dtype=torch.float64)
        best[0, 0] = 0.0
        ages = torch.arange(1, self.longest + 1, dtype=torch.float64).square()[:, None]
        for step, density in enumerate(self.density[1:], 1):
            computed, came = best.min(0)
            self.back.append(came.tolist())
            reused = torch.full_like(best[1:], math.inf)
            reused[:, 1:] = best[:-1, :-1] + ages / max(density, 1e-6 * step)
            best = torch.cat([computed[None], reused])
        self.last = best

    def computed(self, count: int) -> Tensor:
        """Which steps compute where about `count` are reused: bool (n,)."""
        able = self.last.min(0).values.isfinite().nonzero().flatten().tolist()
        left = max(c for c in able if c <= max(count, 0))
        age = int(self.last[:, left].argmin())
        found = [True] * self.steps
        for step in range(self.steps - 1, 0, -1):
            if age > 0:
                found[step], age, left = False, age - 1, left - 1
            else:
                age = self.back[step - 1][left]
        return torch.tensor(found)


def _longest(column: Tensor) -> int:
    run = best = 0
    for computed in column.tolist():
        run = 0 if computed else run + 1
        best = max(best, run)
    return best


def _density(column: Tensor, places: Tensor) -> list[float]:
    """How much is reused around each place: 0 before the first step that ever is."""
    reused = (~column).double()
    if not bool(reused.any()):
        return [0.0] * len(places)
    first, half = int(reused.nonzero()[0]), (_longest(column) + 1) / 2
    rows = torch.arange(len(column), dtype=torch.float64)
    found = []
    for place in places.tolist():
        near = (half + 0.5 - (rows - place).abs()).clamp(0, 1) * (rows >= first - 1)
        open_ = place >= first - 0.5 and float(near.sum()) > 0
        found.append(float((near * reused).sum() / near.sum()) if open_ else 0.0)
    return found
