"""Number formats: schemes and recipes, grids of values, quantized tensors."""

from .grid import Grid
from .integer_codes import affine
from .qtensor import QTensor, layout
from .scheme import Format, Recipe, Rule, Scheme, named, schemes

__all__ = [
    "Format",
    "Grid",
    "QTensor",
    "Recipe",
    "Rule",
    "Scheme",
    "affine",
    "layout",
    "named",
    "schemes",
]
