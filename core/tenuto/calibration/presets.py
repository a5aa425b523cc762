"""Presets of effort, and the recipe that a scheme stands for where a user names no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import SchemeError
from ..model import Backbone
from ..numerics import Recipe, Scheme
from ..runtime import default_recipe
from .algorithms import Effort, by_name
from .algorithms.nearest import RoundToNearest
from .algorithms.tiar import Tiar


@dataclass(frozen=True)
class Preset:
    """How much is done. prompts and batch: of the recording; temporal: for time-only modules.

    effort: of the algorithm that rounds weights below 8 bits; usual: its name, unless a user says.
    """

    prompts: int
    batch: int
    temporal: Tiar
    effort: Effort
    usual: str = "gptq"

    def rounding(self, name: str | None = None, scheme: Scheme | None = None) -> Any:
        """The algorithm called `name` at this effort; None: the usual one. Else SchemeError.

        scheme: of the weights; those whose values lie at unequal distances not every one can round.
        """
        able = scheme is None or not scheme.of_files
        found = by_name(name or (self.usual if able else "gptq"), "denoiser", self.effort)
        if not able and getattr(found, "even", False):
            assert scheme is not None
            said = "to nearest or by GPTQ"
            raise SchemeError(f"Weights in {scheme.name} are rounded {said}, not by {found.name}.")
        return found


PRESETS = {
    "quick": Preset(16, 4, Tiar(100), Effort(256, 300, 16)),
    "standard": Preset(64, 8, Tiar(300), Effort(512, 600, 32)),
    "thorough": Preset(64, 8, Tiar(1000), Effort(2048, 1000, 32), "adaround"),
}


def effort(name: str) -> Preset:
    """The preset called `name`; SchemeError names the choices."""
    if name not in PRESETS:
        raise SchemeError(f"Unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def recipe_for(scheme: Scheme, backbone: Backbone, rounding: Any = None) -> Recipe:
    """The default recipe: first and last layers at 8 bits, the rest at `scheme`.

    Weights below 8 bits are rounded by `rounding` (an algorithm), 8-bit ones to nearest; so are
    time-only layers, for which `quantize` has better than to round them apart.
    """
    return default_recipe(scheme, backbone, RoundToNearest(), rounding)
