"""Number formats: schemes and recipes, grids of values, quantized tensors."""

from . import float8, native
from .curves import Curves, half
from .grid import Grid, covering, ends, fits
from .integer_codes import affine
from .qtensor import QTensor, layout
from .scheme import Format, Recipe, Rule, Scheme, known, label, named, schemes

__all__ = [
    "Curves",
    "Format",
    "Grid",
    "QTensor",
    "Recipe",
    "Rule",
    "Scheme",
    "affine",
    "covering",
    "ends",
    "fits",
    "float8",
    "half",
    "known",
    "label",
    "layout",
    "named",
    "native",
    "schemes",
]
