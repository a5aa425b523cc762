"""Number formats: schemes and recipes, grids of values, quantized tensors."""

from . import float8, native
from .grid import Grid, covering, ends, fits
from .integer_codes import affine
from .qtensor import QTensor, layout
from .scheme import Format, Recipe, Rule, Scheme, known, label, named, schemes

__all__ = [
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
    "known",
    "label",
    "layout",
    "named",
    "native",
    "schemes",
]
