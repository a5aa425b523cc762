"""The unit of the choice select: options of every module measured, and the best within a budget."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...numerics import QTensor, half, layout
from ...progress import Progress
from .kept import Tables, pair, per_step, unit_tensors
from .selection import Option, Table, cost, of_tables, selected

if TYPE_CHECKING:
    from .maintenance import Maintenance

log = logging.getLogger("tenuto")


def selected_unit(time: Maintenance, seed: int, note: Progress) -> dict[str, Tensor]:
    """The tensors of the choice select; of each option its bytes and effect, float64 (2,)."""
    path, sizes = time.path, _sizes(time)
    computing = {n for n, some in sizes.items() if some}
    worths = time.worth(computing, note) if time.worth is not None and path.names else {}
    made = {
        n: [Table.of(t, w) for t, w in zip(path.features[n], worths[n], strict=True)]
        for n in path.names
    }
    options = {n: of_tables(tables) for n, tables in made.items()}
    weights: dict[str, QTensor] = {}
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    answers: dict[str, tuple[Tensor, ...]] = {}
    wanted = {n for n, some in sizes.items() if "tiar" in some}
    if wanted:
        weights, ranges = time.ranged(wanted, seed, note)
        answers = path.answers(time.static(weights), ranges, {})
    for name in computing:
        errors = {"float": 0.0}
        if name in wanted:
            each = zip(answers[name], path.features[name], worths[name], strict=True)
            errors["tiar"] = sum(cost(*some) for some in each)
        options[name] += [Option(k, n, errors[k]) for k, n in sizes[name].items()]
    full = sum(half(t).nbytes for some in path.features.values() for t in some)
    chosen = selected(options, time.budget * full)
    if (total := sum(o.nbytes for o in chosen.values())) > time.budget * full:
        log.warning("The time path takes %d bytes at the least, above its budget", total)
    tables: Tables = {
        n: tuple(t.kept(count) for t, count in zip(made[n], chosen[n].curves, strict=True))
        for n in path.names
        if chosen[n].kind == "table"
    }
    weights = {n: q for n, q in weights.items() if chosen[path.owner(n)].kind == "tiar"}
    ranges = {n: some for n, some in ranges.items() if n in weights}
    found = {f"chosen/{n}": pair(o) for n, o in chosen.items()}
    for name, some in options.items():
        ends = {o.kind: o for o in some}  # of tables the last: all in fp16
        found |= {f"option/{kind}/{name}": pair(o) for kind, o in ends.items()}
    return found | unit_tensors(time.errors(weights, ranges, tables), weights, ranges, tables)


def _sizes(time: Maintenance) -> dict[str, dict[str, int]]:
    """Bytes of each module reconstructed and in float, where they are below its table's."""
    found: dict[str, dict[str, int]] = {}
    for name in time.path.names:
        own = {n: s for n, s in time.schemes.items() if time.path.owner(n) == name}
        tiar, plain = 0, 0
        for layer, scheme in own.items():
            weight: Any = time.path.get_submodule(time.path.local(layer)).weight
            shape = tuple(weight.shape)
            parts = layout(layer, shape, scheme.weight).values()
            tiar += sum(dtype.itemsize * math.prod(part) for dtype, part in parts)
            tiar += 8 * len(time.path.timesteps) if per_step(scheme).stored else 0
            plain += 2 * math.prod(shape)
        table = sum(half(t).nbytes for t in time.path.features[name])
        both = {"tiar": tiar, "float": plain}
        found[name] = {kind: n for kind, n in both.items() if n < table}
    return found
