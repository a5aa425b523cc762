"""Rounding a weight column by column, given the second moments of its inputs: GPTQ's arithmetic.

A = R R^T (R upper triangular) turns the squared error of values V to W* into that of (V - W*) R,
whose column j knows of no column of V after j. So columns are rounded in turn, each to the best
value that is left, and E = (W* - V) R is what all columns leave over: GPTQ's e_j (with U = R^-1 of
the paper), and half the gradient is -E R^T. Nearly all of it are products of tiles in fp32, which
take triangles for what they are: of a weight (N, K) N K^2 operations a stage, and nothing is
written that is not read again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .columns import Columns

WIDTH = 128  # columns that are rounded between two products
PART = 1024  # columns of a triangular product that are made at a time


@dataclass(frozen=True)
class Factor:
    """What all weights of one input share.

    order: of the columns, the most used one first. gram: A in that order, damped, and `root`, the
    R with A = R R^T, (K, K) fp32.
    """

    order: Tensor
    gram: Tensor
    root: Tensor

    @classmethod
    def of(cls, gram: Tensor, damping: float) -> Factor:
        """Of A (K, K). A may have a condition of 1e6: its factor is made in fp64, one at a time."""
        diagonal = gram.diagonal().double()
        more = damping * diagonal.mean().clamp_min(1e-12)
        order = (diagonal + more).argsort(descending=True)
        gram = gram[order].float()
        gram = gram[:, order]
        wide = gram.flip(0, 1).double()  # R is the factor of the reverse
        wide.diagonal().add_(more)
        lower = torch.linalg.cholesky(wide)
        del wide
        gram.diagonal().add_(more)
        return cls(order, gram, lower.float().flip(0, 1))

    def solved(self, gap: Tensor) -> Tensor:
        """D R^-T (N, K): what a least-squares shift of the weight by D A^-1 is in terms of R."""
        return torch.linalg.solve_triangular(self.root.mT, gap, upper=False, left=False)


def gram_of(x: Tensor, gram: Tensor | None = None) -> Tensor:
    """x^T x (G, K, K) of inputs (G, R, K), added to `gram`: the upper tiles alone, see `mirrored`.

    Tiles on the diagonal are whole.
    """
    size = x.shape[-1]
    gram = x.new_zeros(len(x), size, size) if gram is None else gram
    for start in range(0, size, PART):
        tile = slice(start, start + PART)
        for at, group in enumerate(x):
            gram[at, tile, start:].addmm_(group[:, tile].mT, group[:, start:])
    return gram


def mirrored(gram: Tensor) -> Tensor:
    """A whole symmetric matrix (G, K, K) of its upper tiles, in place."""
    size = gram.shape[-1]
    for start in range(0, size, PART):
        tile, rest = slice(start, start + PART), slice(start + PART, None)
        gram[:, rest, tile] = gram[:, tile, rest].mT
    return gram


def compensated(
    weight: Tensor, root: Tensor, grid: Columns, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Values V (N, K) of a weight W, column after column, and E = (W* - V) R.

    root: R. shift: (W* - W) R (N, K), or None: W* is W. It is written to.
    """
    values, left = torch.empty_like(weight), torch.empty_like(weight)
    errors = torch.zeros_like(weight) if shift is None else shift
    one = torch.eye(WIDTH, dtype=root.dtype, device=root.device)
    for start in range(0, weight.shape[1], WIDTH):
        tile = slice(start, start + WIDTH)
        square = root[tile, tile]
        inverse = torch.linalg.solve_triangular(
            square, one[: len(square), : len(square)], upper=True
        )
        owed = torch.addmm(errors[:, tile], left[:, :start], root[:start, tile])
        rest = torch.addmm(weight[:, tile], owed, inverse)
        values[:, tile], errors[:, tile] = grid.at(tile).compensate(rest, inverse)
        left[:, tile] = weight[:, tile] - values[:, tile]
    return values, errors


def slope_of(errors: Tensor, root: Tensor) -> Tensor:
    """Half the gradient, (V - W*) A (N, K), of E; it takes E's place."""
    for start in range(0, errors.shape[1], PART):
        tile = slice(start, start + PART)
        errors[:, tile] = -(errors[:, start:] @ root[tile, start:].mT)
    return errors


def descended(
    values: Tensor, slope: Tensor, gram: Tensor, grid: Columns, sweeps: int = 1
) -> Tensor:
    """Values (N, K) after sweeps in which every column takes its best one.

    slope: half the gradient before the first sweep, (V - W*) A.
    """
    values, moved = values.clone(), torch.zeros_like(values)
    for sweep in range(sweeps):
        for start in range(0, values.shape[1], WIDTH):
            tile, known = slice(start, start + WIDTH), slice(0, None if sweep else start)
            now = torch.addmm(slope[:, tile], moved[:, known], gram[known, tile])
            new = grid.at(tile).descend(now, gram[tile, tile], values[:, tile])
            moved[:, tile] += new - values[:, tile]
            values[:, tile] = new
    return values
