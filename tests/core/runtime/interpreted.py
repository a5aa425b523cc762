"""Triton's interpreter, with reductions by halves in place of element by element.

Where a kernel reduces by a function of its own, the interpreter calls that function once for each
number, which takes nine tenths of the time. The same function on halves gives the same, up to the
order of sums, which no card promises either.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter


def by_halves(self: Any, input: tuple[Any, ...]) -> list[Any]:
    """In place of `ReduceOps.generic_reduce`; along powers of two, as all sides of a tile are."""
    given, axis = self.unravel(input, self.axis)
    kinds, parts = [x.dtype for x in given], [x.handle.data for x in given]
    while (wide := parts[0].shape[axis]) > 1:
        halves = [np.split(part, [wide // 2], axis) for part in parts]
        left, right = (
            [self.to_tensor(half[side], kind) for half, kind in zip(halves, kinds, strict=True)]
            for side in (0, 1)
        )
        made = self.combine_fn.fn(*left, *right)
        parts = [x.handle.data for x in (made if isinstance(made, tuple) else (made,))]
    if not self.keep_dims:
        parts = [part.squeeze(axis) for part in parts]
    return [self.to_tensor(part, kind) for part, kind in zip(parts, kinds, strict=True)]


interpreter.ReduceOps.generic_reduce = by_halves
