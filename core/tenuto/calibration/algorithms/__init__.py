"""One quantization algorithm a file: a frozen dataclass, called on the layers of a block.

    algorithm(block, layers, bank, target, seed=0, on_progress=None) -> {name: QTensor}

block: a module in float whose weights may be changed. layers: name inside the block -> Scheme.
bank: recorded inputs of the block (`replay.Bank`), or None. target: its full-precision outputs,
row by row as in the bank, or None; `bank.parts` says how many go into one call, `bank.of` takes
them from the target. `needs_inputs` says whether bank and target are used, and
`needs_target = False` that the bank alone is.

The file is all that there is to write: a class with a `name` can be chosen by it, everywhere. What
else a class may say: `aliases`, further names; `parts`, of a pipeline that it is for (`PARTS`
unless it says so); `smooth`, that it scales the columns of a weight, which the format then has to
store; `even`, that it needs values of equal distances; `together`, that it shares its work by
`processes()` itself, where several processes do a job (else one of them does it);
`at(effort)`, a class method, itself at an `Effort`; `stage`, one of `STAGES`, that it can be one of
several that follow each other (`stages.py`): all but a transform then take `before`, {name:
QTensor} of the stages before it, or of the layers rounded to nearest where they are known, whose
ranges and scales of columns it keeps where it searches none itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import SchemeError
from ...resources import classes, found

PARTS = ("denoiser", "encoder")
CHAINS = {"awq-gptq": "awq+gptq"}  # further names of chains
STAGES = ("transform", "clip", "reconstruct")  # what a stage does, in the order of a chain


@dataclass(frozen=True)
class Effort:
    """What a user wants to spend, for an algorithm to make of it what it can.

    rows: recorded inputs of a block that are looked at. iterations, batch: steps of an optimizer
    and rows in each.
    """

    rows: int = 256
    iterations: int = 300
    batch: int = 16


def spelled(name: str) -> str:
    """The name of an algorithm or a chain of them as it is kept: others are of older versions."""
    return CHAINS.get(name, name)


def goes_on(algorithm: Any) -> bool:
    """Whether it takes `before`: what the layers are so far."""
    return getattr(algorithm, "stage", None) in STAGES[1:]


def names(part: str) -> tuple[str, ...]:
    """The algorithms for a part of a pipeline, "denoiser" or "encoder", by name."""
    return tuple(n for n, cls in classes(__name__).items() if part in getattr(cls, "parts", PARTS))


def by_name(name: str, part: str, effort: Effort | None = None) -> Any:
    """The algorithm called `name` for such a part at this effort; None: with its own defaults.

    Names with a plus between them are stages that follow each other, such as "awq+clip+gptq";
    "awq-gptq" is an older name of such a chain. SchemeError names the choices, or the order of
    stages.
    """
    name = spelled(name)
    if "+" in name:
        from .stages import Stages  # imports algorithms, which import this

        return Stages(tuple(by_name(one, part, effort) for one in name.split("+")))
    known = names(part)
    for own, cls in classes(__name__).items():
        if own in known and name in (own, *getattr(cls, "aliases", ())):
            return cls.at(effort) if effort is not None and hasattr(cls, "at") else cls()
    raise SchemeError(f"Unknown rounding {name!r}: choose one of {', '.join(known)}.")


def algorithm(data: dict[str, Any]) -> Any:
    """The algorithm that a recipe's JSON names: {"name": of the class, settings...}."""
    settings = dict(data)
    name = settings.pop("name", None)
    for module in found(__name__).values():
        cls = vars(module).get(str(name))
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            try:
                return cls(**settings)
            except TypeError as error:
                raise SchemeError(f"{name} does not take {settings}.") from error
    raise SchemeError(f"Unknown algorithm {name!r}.")
