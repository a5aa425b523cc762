"""Disturbance-aware selection: where the bytes of the time path are spent.

Temporal Feature Matters (arXiv 2407.19547) chooses between reconstruction and cache by the error of
the features; what it says of the rule is no more than that. Here the error is weighted by what it
does to the final sample (`disturbance.py`), and each module takes one of

    a table in fp16, or of so many curves in int8 (`numerics/curves.py`); each output by itself,
    a reconstruction (TIAR, one range a step), the module as it is, in 16 bits,

so that the sum of the errors is small and that of the bytes within a budget. Modules that compute
are looked at only where they are smaller than their table in fp16: the table is nearer, too.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...errors import SchemeError
from ...numerics import Curves, half
from ...numerics.curves import CODES, size

BUDGET = 0.5  # of what all tables take in fp16, where nobody says more
CURVES = 64  # of one output, at most


@dataclass(frozen=True)
class Option:
    """One way to keep a module: bytes, and the squared error of the final sample that it costs.

    kind: "table", "tiar" or "float". curves: of each output of a table; 0: rows in fp16.
    """

    kind: str
    nbytes: int
    effect: float
    curves: tuple[int, ...] = ()


def check_budget(budget: float | None, choice: str) -> float:
    """The share of the full table; SchemeError where it is none, or where `choice` needs none."""
    if budget is None:
        return BUDGET
    if choice != "select":
        raise SchemeError(f"A table budget is for the temporal choice select, not for {choice}.")
    if not (isinstance(budget, int | float) and 0 < budget < math.inf):
        raise SchemeError("A table budget is a share of the full table: above 0.")
    return float(budget)


def at_half(rows: Tensor) -> Curves:
    """`rows` as curves in half the bytes that they take in fp16.

    Where these are further off than rows in int8 would be, as those of few steps may be, a few more
    are taken: until it is not so, and never so many that they take what fp16 does.
    """
    flat, full = rows.detach().cpu().double().flatten(1), half(rows).nbytes
    one = size(len(rows), rows[0].numel(), 1)
    fewest, most = max(1, full // 2 // one), max(1, min(len(rows), (full - 1) // one))
    curves = Curves.of(rows, max(fewest, most))
    unit = flat.abs().amax(1, keepdim=True).clamp_min(1e-12) / CODES
    enough = float(((flat / unit).round() * unit - flat).square().sum())
    for count in range(fewest, len(curves.codes)):
        found = curves.first(count).rows().double().flatten(1)
        if float((found - flat).square().sum()) <= enough:
            return curves.first(count)
    return curves


@dataclass(frozen=True)
class Table:
    """One output as a table: the rows, all their curves, and what each way to keep them costs."""

    rows: Tensor
    curves: Curves
    points: tuple[tuple[int, int, float], ...]  # curves (0: rows), bytes, effect

    @staticmethod
    def of(rows: Tensor, worth: Tensor) -> Table:
        """rows: (T, ...) in full precision. worth: float64 (T,), of a squared error at a step."""
        full, width = half(rows), rows[0].numel()
        count = min(CURVES, (full.nbytes - 1) // size(len(rows), width, 1))
        curves = Curves.of(rows, max(1, count), worth)
        points = [(0, full.nbytes, cost(full, rows, worth))]
        for number in range(1, len(curves.codes) + 1):
            found = cost(half(curves.first(number).rows()), rows, worth)
            points.append((number, size(len(rows), width, number), found))
        return Table(rows, curves, tuple(points))

    def kept(self, count: int) -> Tensor | Curves:
        """What an artifact has of it: rows in fp16 (0), or so many curves."""
        return self.curves.first(count) if count else half(self.rows)


def cost(found: Tensor, rows: Tensor, worth: Tensor) -> float:
    """The squared error of the final sample, where `found` stands for `rows`, both (T, ...)."""
    gap = (found.double() - rows.double()).flatten(1).square().sum(1)
    return float((gap * worth).sum())


def of_tables(tables: Sequence[Table]) -> list[Option]:
    """The ways to keep all outputs of a module as tables, from the smallest to the nearest."""
    names = [str(number) for number in range(len(tables))]
    each = {
        name: [Option("table", n, effect, (count,)) for count, n, effect in table.points]
        for name, table in zip(names, tables, strict=True)
    }
    found = []
    for picked in _steps(each, math.inf):
        some = [picked[name] for name in names]
        total = sum(o.nbytes for o in some), sum(o.effect for o in some)
        found.append(Option("table", *total, tuple(o.curves[0] for o in some)))
    return found


def selected(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """An option of each module: together at most `budget` bytes, or the smallest there are.

    Greedy over the convex hulls: the next byte goes where it takes most off the error, which is the
    best there is but for the last step (the relaxation of the knapsack with choices).
    """
    last: dict[str, Option] = {}
    for last in _steps(options, budget):  # noqa: B007
        pass
    return last


def _steps(options: Mapping[str, Sequence[Option]], budget: float) -> Iterable[dict[str, Option]]:
    """Selections that grow: first the smallest, then one step at a time, the best for its bytes."""
    hulls = {name: hull(some) for name, some in options.items()}
    now = dict.fromkeys(hulls, 0)
    left = budget - sum(found[0].nbytes for found in hulls.values())
    yield {name: hulls[name][0] for name in hulls}
    heap = [(_slope(found, 0), name) for name, found in hulls.items() if len(found) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        found, place = hulls[name], now[name]
        more = found[place + 1].nbytes - found[place].nbytes
        if more > left:
            continue
        left, now[name] = left - more, place + 1
        yield {name: hulls[name][now[name]] for name in hulls}
        if place + 2 < len(found):
            heapq.heappush(heap, (_slope(found, place + 1), name))


def hull(options: Iterable[Option]) -> list[Option]:
    """The lower convex hull: bytes grow, the error falls, and by less for each further byte."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.effect)):
        if found and option.effect >= found[-1].effect:
            continue
        while len(found) > 1 and _slope([*found[-2:]], 0) >= _slope([found[-2], option], 0):
            found.pop()
        found.append(option)
    return found


def _slope(found: Sequence[Option], place: int) -> float:
    """What a byte of the next step changes the error by: below 0."""
    one, next_ = found[place], found[place + 1]
    return (next_.effect - one.effect) / max(1, next_.nbytes - one.nbytes)


def rows_of(table: Tensor | Curves) -> Tensor:
    """The rows as `attach` reads them."""
    return half(table.rows()) if isinstance(table, Curves) else table
