"""One model family a file: which classes it covers and what such a denoiser is made of.

A family file has `CLASSES` (class names, never classes: nothing is imported) and
`describe(module) -> Backbone`. `generic.py` serves what no family covers.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from torch import nn

from ..backbone import Backbone
from ..errors import ModelError


def families() -> dict[str, ModuleType]:
    """Every family file by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    found = {n: importlib.import_module(f"{__name__}.{n}") for n in names}
    return {n: m for n, m in found.items() if hasattr(m, "CLASSES")}


def describe(module: nn.Module) -> Backbone:
    """What `module` is made of; ModelError if nothing in it can be quantized or held."""
    kinds = {cls.__name__ for cls in type(module).__mro__}
    for family in families().values():
        if kinds & set(family.CLASSES):
            return family.describe(module)
    backbone = importlib.import_module(f"{__name__}.generic").describe(module)
    if not backbone.blocks:
        raise ModelError(f"{type(module).__name__} has no list of blocks that Tenuto knows.")
    return backbone
