"""One quantization algorithm a file: a frozen dataclass, called on the layers of a block.

    algorithm(block, layers, bank, target, seed=0, on_progress=None) -> {name: QTensor}

block: a module in float whose weights may be changed. layers: name inside the block -> Scheme.
bank: recorded inputs of the block (`replay.Bank`), or None. target: its full-precision outputs,
row by row as in the bank, or None. `needs_inputs` says whether bank and target are used.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ...errors import SchemeError


def algorithm(data: dict[str, Any]) -> Any:
    """The algorithm that a recipe's JSON names: {"name", settings...}."""
    settings = dict(data)
    name = settings.pop("name", None)
    for info in pkgutil.iter_modules(__path__):
        found = getattr(importlib.import_module(f"{__name__}.{info.name}"), str(name), None)
        if isinstance(found, type):
            try:
                return found(**settings)
            except TypeError as error:
                raise SchemeError(f"{name} does not take {settings}.") from error
    raise SchemeError(f"Unknown algorithm {name!r}.")
