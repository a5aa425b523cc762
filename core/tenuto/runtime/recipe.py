"""Which scheme a layer gets where a user names no rules: first and last layers at 8 bits."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model import Backbone
from ..numerics import Recipe, Rule, Scheme, fits, schemes


def default_recipe(
    scheme: Scheme, backbone: Backbone, nearest: Any = None, rounding: Any = None
) -> Recipe:
    """The rules of `scheme` for a model: its first and last layers at 8 bits, the rest at `scheme`.

    Weights below 8 bits name the algorithm `rounding`, 8-bit ones `nearest`; so do time-only
    layers, for which calibration has better than to round them apart. In the numbers of files that
    other programs read, first, last and time-only layers stay in float, as these have them.
    """
    wide = schemes.W8A16 if scheme.activation is None else Scheme(
        f"w8{scheme.name[2:]}", schemes.W8A8.weight, scheme.activation
    )  # fmt: skip
    rules = [Rule(pattern, None) for pattern in backbone.keep]
    time = [pattern for name in backbone.temporal for pattern in (name, f"{name}.*")]
    if scheme.of_files:
        rules += [Rule(pattern, None) for pattern in (*time, *backbone.ends)]
    elif scheme.weight.bits < 8:
        rules += [Rule(pattern, scheme, nearest) for pattern in time]
        rules += [Rule(pattern, wide, nearest) for pattern in backbone.ends]
    last = (rounding or nearest) if scheme.weight.bits < 8 else nearest
    return Recipe((*rules, Rule("*", scheme, last)))


def quantizable(layer: Any, scheme: Scheme | None = None) -> bool:
    """Whether a quantized layer computes what `layer` does: a convolution pads with zeros.

    scheme: what the layer would get; not every format is for any number of columns, nor for
    convolutions, the 8-bit floats of whose inputs nothing multiplies.
    """
    if scheme is not None and not fits(layer.weight.shape, scheme.weight):
        return False
    if not isinstance(layer, nn.Conv2d):
        return True
    if scheme is not None and scheme.activation and scheme.activation.dtype != "int":
        return False
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
