"""Captions that calibration does not see: the better of calibrated and nearest, layer by layer.

What is fitted to some prompts can be worse on others than no calibration at all. A part of the
shipped list "general" is always calibrated on, and another part of it decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..model import private_copy
from ..numerics import QTensor, Rule, Scheme
from ..progress import Progress
from ..resources import prompts
from ..sampling import HELD_OUT
from .algorithms.nearest import RoundToNearest, weight_of
from .bank import Bank
from .by_block import Values
from .replay import token_error

SEEN, HELD = slice(0, None, 2), slice(1, None, 4)  # of the 64: 32 are calibrated on, 16 held out
MOST = 160  # prompts of a user's that are calibrated on beside the general ones

Data = tuple[Bank, Tensor | None]


def captions() -> tuple[list[str], list[str]]:
    """Prompts of the list "general": the calibration set's, and the held-out ones.

    The rest of the list is used for neither, so that benchmarks can measure on it.
    """
    lines = prompts("general")
    return list(lines[SEEN]), list(lines[HELD])


def calibration_prompts(own: Sequence[str]) -> list[str]:
    """The calibration set of an encoder: `own`, at most `MOST` spread evenly, and general ones.

    Held-out prompts are left out of it.
    """
    general, held = captions()
    known = [line for line in dict.fromkeys(own) if line not in held]
    count = min(MOST, len(known))
    some = [known[i * len(known) // count] for i in range(count)]
    return list(dict.fromkeys([*some, *general]))


def apart(bank: Bank, target: Tensor | None) -> tuple[Data, Data | None]:
    """A block's inputs and outputs for an algorithm, and the held-out ones, if there are any.

    target: outputs of all rows, or of the held-out ones.
    """
    held = bank.steps == HELD_OUT
    if not held.any():
        return (bank, target), None
    seen, unseen = ((which.nonzero()[:, 0]) for which in (~held, held))
    if target is None or len(target) == len(unseen):
        return (bank.part(seen), None), (bank.part(unseen), target)
    return (bank.part(seen), target[seen]), (bank.part(unseen), target[unseen])


@torch.no_grad()
def better(
    block: nn.Module,
    found: Mapping[str, QTensor],
    layers: Mapping[str, Scheme],
    held: Data,
    plain: Mapping[str, QTensor] | None = None,
) -> dict[str, QTensor]:
    """`found`, with layers rounded to nearest that bring the block nearer to its target so.

    One layer after another, in the order of `found`, each with what was decided before it. held:
    inputs and outputs of the block that calibration has not seen. plain: the layers to nearest.
    """
    device = next(block.parameters()).device
    plain = RoundToNearest()(block, dict(layers)) if plain is None else plain
    known = {id(q): q.dequantize().to(device) for q in (*plain.values(), *found.values())}
    block, (bank, target) = private_copy(block), held
    rows = torch.arange(len(bank))
    assert target is not None

    def put(names: Mapping[str, QTensor]) -> None:
        for name, q in names.items():
            weight_of(block, name).data = known[id(q)]

    def error() -> float:
        return token_error(block, bank, rows, target, device)

    put(plain)
    least, best = error(), dict(plain)
    put(found)
    calibrated = error()
    if calibrated <= least:
        least, best = calibrated, dict(found)
    put(best)
    for name in found:
        tried = plain[name] if best[name] is found[name] else found[name]
        put({name: tried})
        wrong = error()
        if wrong < least:
            least, best = wrong, best | {name: tried}
        else:
            put({name: best[name]})
    return best


def rounded_to_nearest(
    rules: Mapping[str, Rule], values: Values, note: Progress | None = None
) -> dict[str, QTensor]:
    """Every layer at the nearest codes of its weight in `values`, as its rule has them."""
    plain, found = RoundToNearest(), dict[str, QTensor]()
    plan = {name: rule.scheme for name, rule in rules.items() if rule.scheme is not None}
    for name, scheme in plan.items():
        if note is not None:
            note(len(found), len(plan), name)
        found[name] = plain.weight(values.of(f"{name}.weight"), scheme.weight)
    return found
