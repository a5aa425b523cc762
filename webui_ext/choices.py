"""`Choices`: what a user has chosen, from the accordion, the API, X/Y/Z or an infotext.

The order of the fields is the positional order of the API: append, never reorder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tenuto.caching import rules
from tenuto.errors import TenutoError
from tenuto.numerics import known

FROM_ARTIFACT = "From artifact"
AUTO, OFF, ROUTER = "Auto", "Off", "Router (from artifact)"
RULES = {  # policies that need nothing but a period, found by their files
    (*getattr(cls, "aliases", ()), getattr(cls, "name", title))[0].capitalize(): cls
    for title, cls in rules(("period",)).items()
}
BOTH, FIRST, HIRES = "Both", "First pass only", "Hires only"
FAST = tuple(name.upper() for name, s in known().items() if s.activation and not s.stored)
PRECISIONS = (OFF, *FAST, FROM_ARTIFACT)
CACHES = (AUTO, OFF, *RULES, ROUTER)
PASSES = (BOTH, FIRST, HIRES)
BUILT_IN = "Built-in: "
BALANCED = f"{BUILT_IN}Balanced"
FASTEST = 4.0  # of a forecast
SHORT = {c: c.lower() for c in CACHES} | {ROUTER: "router"}  # of caches, in an infotext


@dataclass(frozen=True)
class Choices:
    """The fields of the accordion.

    cache: Auto skips whole calls where a run allows that, and is Router where it does not. speed:
    the period of a rule, the budget of the others (2: about half is computed). start, stop: shares
    of the steps between which a branch is reused. longest: how often in a row; 0: no limit.
    speedup: above 1, whole calls are skipped instead, so that a run has so many times fewer.
    """

    enabled: bool = False
    artifact: str = BALANCED
    precision: str = FROM_ARTIFACT
    cache: str = AUTO
    speed: float = 2.0
    start: float = 0.15
    stop: float = 1.0
    last: bool = True
    longest: int = 3
    passes: str = BOTH
    speedup: float = 1.0

    def __post_init__(self) -> None:
        for name, table in (("precision", PRECISIONS), ("cache", CACHES), ("passes", PASSES)):
            if getattr(self, name) not in table:
                raise TenutoError(
                    f"Tenuto has no {name} {getattr(self, name)!r}: choose one of "
                    f"{', '.join(table)}."
                )
        if not 1 <= self.speed <= 8 or self.longest < 0:
            raise TenutoError("Tenuto's speed is 1 to 8, and its longest reuse is no less than 0.")
        if not 1 <= self.speedup <= FASTEST:
            raise TenutoError(f"Tenuto's speedup is 1 (off) to {FASTEST:g}.")
        if not 0 <= self.start <= 1 or not 0 <= self.stop <= 1:
            raise TenutoError("Tenuto's start and stop are shares of the steps, from 0 to 1.")

    @staticmethod
    def of(args: Sequence[Any], p: Any = None) -> Choices:
        """From positional arguments, of which any may be missing; `p` may carry X/Y/Z's values."""
        given = {f.name: value for f, value in zip(fields(Choices), args)}  # noqa: B905
        for name in AXES:
            value = getattr(p, f"tenuto_{name}", None)
            if value is not None:
                given[name] = value
        return Choices(**_cast(given))

    def now(self, is_hires: bool) -> bool:
        """Whether the pass that begins is one of those chosen."""
        return self.enabled and self.passes != (FIRST if is_hires else HIRES)


def _cast(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values in their fields' types; TenutoError where one is none."""
    try:
        return {name: KINDS[name](value) for name, value in given.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise TenutoError(f"Tenuto cannot read its settings: {error}.") from error


def _flag(value: Any) -> bool:
    """True, False, or what a text says; `bool("False")` would be True."""
    return value.strip().lower() == "true" if isinstance(value, str) else bool(value)


def _cache(value: Any) -> str:
    """A cache by its label, or by its short name in any case."""
    text = str(value)
    return next((c for c in CACHES if text.lower() in (c.lower(), SHORT[c])), text)


KINDS: dict[str, Callable[[Any], Any]] = {
    "enabled": _flag, "artifact": str, "precision": str, "cache": _cache, "speed": float,
    "start": float, "stop": float, "last": _flag, "longest": lambda v: int(float(v)), "passes": str,
    "speedup": float,
}  # fmt: skip
AXES = ("enabled", "artifact", "precision", "cache", "speed", "start", "speedup")
PRESETS = {  # the buttons; they fill all but the first two fields and the last two
    "Quality": Choices(speed=1.5, start=0.3, longest=1),
    "Balanced": Choices(),
    "Fast": Choices(speed=3.0, start=0.1, longest=5),
}
KEYS = {  # of the infotext, where they are not the default
    "speed": "Tenuto speed", "start": "Tenuto start", "stop": "Tenuto stop", "last": "Tenuto last",
    "longest": "Tenuto max reuse", "passes": "Tenuto passes", "speedup": "Tenuto speedup",
}  # fmt: skip
MAIN, ARTIFACT, HASH, VERSION = (
    "Tenuto",
    "Tenuto artifact",
    "Tenuto artifact hash",
    "Tenuto version",
)
PREDICTED = "Tenuto predicted"  # what skipping calls is likely to cost, known after sampling


def infotext(choices: Choices, scheme: str, mark: str | None, version: str) -> dict[str, Any]:
    """What goes under an image. scheme: what "From artifact" stands for; mark: 8 hex of a file."""
    precision = scheme if choices.precision == FROM_ARTIFACT else choices.precision
    found: dict[str, Any] = {
        MAIN: f"{precision}+{SHORT[choices.cache]}", ARTIFACT: choices.artifact, HASH: mark,
    }  # fmt: skip
    plain = Choices()
    for name, key in KEYS.items():
        value = getattr(choices, name)
        found[key] = None if value == getattr(plain, name) else f"{value}"
    return found | {VERSION: version}


def pasted(params: Mapping[str, Any]) -> Choices | None:
    """The choices of an infotext's parameters; None where Tenuto was off. TenutoError if odd."""
    if MAIN not in params:
        return None
    precision, _, cache = str(params[MAIN]).partition("+")
    precision = next((p for p in PRECISIONS if p.lower() == precision.lower()), FROM_ARTIFACT)
    found = Choices.of((True, params.get(ARTIFACT, BALANCED), precision, cache))
    more = {name: params[key] for name, key in KEYS.items() if key in params}
    return replace(found, **_cast(more))
