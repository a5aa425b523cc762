"""Number formats, schemes and recipes: frozen data that a user writes, JSON both ways."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, cast

from ..errors import SchemeError
from . import e2m1, int8_levels

LEVELS: Mapping[str, Any] = {"int8_levels": int8_levels, "e2m1": e2m1}  # by dtype
GRANULARITIES = ("tensor", "channel", "token")
DTYPES = ("int", "e4m3", "int8_levels", "e2m1")


@dataclass(frozen=True)
class Format:
    """One number format.

    granularity: "channel" is one range per output channel (weights), "tensor" one for all values
    (of weights, 8-bit floats alone), "token" one per row, found on the fly (per image in a
    convolution, whose pixels mix).
    per_step: with "tensor", one range for every calibrated step (FSC of TFMQ-DM, arXiv 2311.16503).
    ranges: how a stored range is found: "minmax", "mse" or "percentile".
    group: of a weight's row, how many columns share a range; 0: all of them. See `grid.py`.
    smooth: a weight is multiplied by a scale per column before it is rounded, and divided by it
    afterwards (AWQ, arXiv 2306.00978).
    dtype: "int" is whole codes of 2 to 8 bits, "e4m3" an 8-bit float, "int8_levels" codes for 8-bit
    whole numbers and "e2m1" a 4-bit float, both with an e4m3 factor a group. See the files of these
    names, and `float8.py`.
    rotate: a weight is rotated along its columns before it is rounded, and its inputs before they
    are. See `rotation.py`.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: str = "channel"
    per_step: bool = False
    ranges: str = "minmax"
    group: int = 0
    smooth: bool = False
    dtype: str = "int"
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SchemeError(f"Unknown dtype {self.dtype!r}: one of {', '.join(DTYPES)}.")
        if self.dtype == "e4m3" and not (
            self.bits == 8 and self.symmetric and self.ranges == "minmax" and not self.group
        ):
            raise SchemeError("A format e4m3 has 8 bits, symmetric min-max ranges and no groups.")
        if not 2 <= self.bits <= 8:
            raise SchemeError(f"A format has 2 to 8 bits, not {self.bits}.")
        if self.granularity not in GRANULARITIES:
            raise SchemeError(f"Unknown granularity {self.granularity!r}: one of {GRANULARITIES}.")
        if self.ranges not in ("minmax", "mse", "percentile"):
            raise SchemeError(f"Unknown range search {self.ranges!r}.")
        if self.dtype in LEVELS:
            self._check_levels()
        elif self.group and (self.bits > 4 or self.symmetric or self.group < 8 or self.group % 8):
            raise SchemeError("Groups are for asymmetric weights of 4 bits or less: 8, 16, 24, ...")
        if self.rotate and (self.smooth or self.dtype not in ("int", "int8_levels")):
            raise SchemeError("A rotated weight has whole codes and no scale per column.")
        if self.rotate and self.dtype == "int" and not (self.bits == 8 and self.symmetric):
            raise SchemeError("A rotated weight of whole codes has 8 bits and a symmetric range.")

    def _check_levels(self) -> None:
        """SchemeError unless it is a format whose codes are places in a table."""
        kind = LEVELS[self.dtype]
        if self.bits not in kind.BITS or self.group not in kind.GROUPS or not self.symmetric:
            bits, groups = (" or ".join(map(str, some)) for some in (kind.BITS, kind.GROUPS))
            raise SchemeError(f"A format {self.dtype} has {bits} bits and groups of {groups}.")
        if self.ranges == "percentile" or self.dynamic:
            raise SchemeError(f"The ranges of {self.dtype} are a weight's: minmax or mse.")

    @property
    def dynamic(self) -> bool:
        """Whether the range is found on the fly, from the values themselves."""
        return self.granularity == "token"


@dataclass(frozen=True)
class Scheme:
    """A weight format and an activation format; `activation` None leaves activations in float."""

    name: str
    weight: Format
    activation: Format | None = None

    @property
    def stored(self) -> bool:
        """Whether it has ranges that calibration finds: it cannot be applied without one."""
        return self.activation is not None and not self.activation.dynamic

    @property
    def of_files(self) -> bool:
        """Whether its weights are numbers of files of other programs that no other scheme has."""
        return self.weight.rotate or self.weight.dtype in LEVELS

    def __post_init__(self) -> None:
        whole = self.weight.granularity == "tensor" and self.weight.dtype == "e4m3"
        if self.weight.granularity != "channel" and not whole:
            raise SchemeError("Weights are quantized per output channel, or in groups of it.")
        if self.weight.bits == 8 and not self.weight.symmetric:
            raise SchemeError(
                "8-bit weights are symmetric: the integer kernels have no zero point."
            )
        if self.activation is not None:
            _check_activation(self.activation)
            if self.weight.smooth:
                raise SchemeError("A scale per column is for weights whose inputs stay in float.")
            if self.weight.rotate and not self.activation.dynamic:
                raise SchemeError("Inputs that are rotated are quantized per token.")

    def to_json(self) -> dict[str, Any]:
        """Plain data for a header; without what older versions do not know, where it says no."""
        found = asdict(self)
        for form in (found["weight"], found["activation"]):
            if form and not form["smooth"]:
                del form["smooth"]
            if form and form["dtype"] == "int":
                del form["dtype"]
            if form and not form["rotate"]:
                del form["rotate"]
        return found

    @staticmethod
    def from_json(data: dict[str, Any]) -> Scheme:
        """The scheme that `to_json` wrote."""
        try:
            activation = data["activation"] and Format(**data["activation"])
            return Scheme(data["name"], Format(**data["weight"]), activation)
        except (KeyError, TypeError) as error:
            raise SchemeError(f"Not a scheme: {data!r}.") from error


def _check_activation(form: Format) -> None:
    """What no layer computes is refused here, before it passes as something else."""
    if form.granularity == "channel":
        raise SchemeError("Activations are quantized per tensor or per token.")
    if form.bits != 8 or form.ranges != "minmax" or form.group or form.smooth or form.rotate:
        raise SchemeError("Activations have 8 bits and min-max ranges.")
    if form.dtype == "int" and form.symmetric != form.dynamic:
        raise SchemeError("Activation ranges are symmetric per token, asymmetric per tensor.")


@dataclass(frozen=True)
class Rule:
    """Layers that match `pattern` (fnmatch) get `scheme` by `algorithm`; None stays float."""

    pattern: str
    scheme: Scheme | None
    algorithm: Any = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; an algorithm is its class name and settings."""
        algorithm = self.algorithm and _settings(self.algorithm)
        scheme = self.scheme and self.scheme.to_json()
        return {"pattern": self.pattern, "scheme": scheme, "algorithm": algorithm}


def _settings(value: Any) -> Any:
    """An algorithm as the name of its class and its settings; those of one may be others."""
    if isinstance(value, tuple):
        return [_settings(one) for one in cast("tuple[Any, ...]", value)]
    if not is_dataclass(value):
        return value
    found = {f.name: _settings(getattr(value, f.name)) for f in fields(value)}
    return {"name": type(value).__name__, **found}


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; the first whose pattern matches wins, no match stays float."""

    rules: tuple[Rule, ...]

    def rule(self, name: str) -> Rule | None:
        """The rule of the layer called `name`, or None where it stays float."""
        found = next((r for r in self.rules if fnmatch.fnmatchcase(name, r.pattern)), None)
        return found if found is not None and found.scheme is not None else None

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data for a header."""
        return [rule.to_json() for rule in self.rules]

    @staticmethod
    def from_json(
        data: Iterable[dict[str, Any]], algorithm: Callable[[dict[str, Any]], Any]
    ) -> Recipe:
        """The recipe that `to_json` wrote; `algorithm` turns {"name", settings...} into one."""
        rules: list[Rule] = []
        try:
            for row in data:
                scheme = row["scheme"] and Scheme.from_json(row["scheme"])
                found = row["algorithm"] and algorithm(row["algorithm"])
                rules.append(Rule(row["pattern"], scheme, found))
        except (KeyError, TypeError) as error:
            raise SchemeError(f"Not a recipe: {data!r}.") from error
        return Recipe(tuple(rules))


_W8 = Format(8, symmetric=True, ranges="minmax")
_W4 = Format(4, symmetric=False, ranges="mse", group=32)
_TOKEN = Format(8, symmetric=True, granularity="token")
_STEP = Format(8, symmetric=False, granularity="tensor", per_step=True)
_E4M3 = Format(dtype="e4m3")
_LEVELS = Format(4, ranges="mse", group=16, dtype="int8_levels", rotate=True)


class schemes:
    """The named schemes. `*_STATIC`: one activation range per step instead of one per token.

    `COMFY_*` and NVFP4: the numbers of files that ComfyUI and others read by themselves, see
    `native/`.
    """

    W8A8 = Scheme("w8a8", _W8, _TOKEN)
    W6A8 = Scheme("w6a8", Format(6, symmetric=True, ranges="mse"), _TOKEN)
    W4A8 = Scheme("w4a8", _W4, _TOKEN)
    W8A16 = Scheme("w8a16", _W8)
    W4A16 = Scheme("w4a16", _W4)
    W8A8_STATIC = Scheme("w8a8-static", _W8, _STEP)
    W4A8_STATIC = Scheme("w4a8-static", _W4, _STEP)
    FP8 = Scheme("fp8", _E4M3, Format(dtype="e4m3", granularity="token"))
    FP8_STATIC = Scheme(
        "fp8-static", _E4M3, Format(dtype="e4m3", granularity="tensor", per_step=True)
    )
    COMFY_W4A8 = Scheme("comfy-w4a8", _LEVELS, _TOKEN)
    COMFY_W6A8 = Scheme("comfy-w6a8", replace(_LEVELS, bits=6), _TOKEN)
    COMFY_INT8 = Scheme("comfy-int8", Format(8, ranges="minmax", rotate=True), _TOKEN)
    NVFP4 = Scheme("nvfp4", Format(4, ranges="mse", group=16, dtype="e2m1"))


def known() -> dict[str, Scheme]:
    """The named schemes by name."""
    return {s.name: s for s in vars(schemes).values() if isinstance(s, Scheme)}


def label(scheme: Scheme) -> str:
    """A scheme in a few words, such as "W4A8: 4-bit weights, 8-bit inputs"."""
    weights, inputs = _words(scheme.weight), scheme.activation
    if inputs is None:
        return f"{scheme.name.upper()}: {weights} weights only"
    both = " and" if _words(inputs) == weights else f", {_words(inputs)}"
    step = "" if inputs.dynamic else ", a range a step"
    return f"{scheme.name.upper()}: {weights} weights{both} inputs{step}"


def _words(form: Format) -> str:
    return f"{form.bits}-bit" + (" float" if form.dtype in ("e4m3", "e2m1") else "")


def named(name: str) -> Scheme:
    """The scheme called `name`, e.g. "w8a8"; SchemeError names the choices."""
    table = known()
    if name not in table:
        raise SchemeError(f"Unknown scheme {name!r}: choose one of {', '.join(table)}.")
    return table[name]
