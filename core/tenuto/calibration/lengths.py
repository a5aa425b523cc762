"""Recorded calls of several lengths in one bank: texts, each batch as long as its longest one.

A tensor whose size differs from call to call along an axis, and is the number of tokens there, is
kept at the length of the longest call and cut when it is asked for: rows of one length go together
(`Bank.parts`), so a block gets what it got, and nothing is computed of what only fills up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ModelError

Seen = tuple[Any, list[Tensor], int]


@dataclass(frozen=True)
class Lengths:
    """Of a bank's rows. tokens: int64 (R,). most: of the tensors. axes: by key, those of tokens.

    fixed: keys of tensors that all calls have alike, as far as they go.
    """

    tokens: Tensor
    most: int
    axes: Mapping[int, tuple[int, ...]]
    fixed: frozenset[int] = frozenset()

    def of(self, index: Tensor) -> int:
        """Tokens of the rows `index`; ModelError where they have several lengths."""
        found = self.tokens[index.cpu()]
        if len(found) and not bool((found == found[0]).all()):
            raise ModelError("Texts of several lengths are no one call: see Bank.parts.")
        return int(found[0]) if len(found) else self.most

    def part(self, index: Tensor) -> Lengths:
        """Of the rows `index` alone."""
        return replace(self, tokens=self.tokens[index.cpu()])

    def runs(self, index: Tensor) -> list[Tensor]:
        """`index` in parts of rows that follow each other and are equally long."""
        _, counts = torch.unique_consecutive(self.tokens[index.cpu()], return_counts=True)
        return list(index.split(counts.tolist()))

    def cut(self, key: int, tensor: Tensor, tokens: int) -> Tensor:
        """A tensor of the bank as a call of so many tokens has it."""
        for axis in self.axes.get(key, ()):
            tensor = tensor.narrow(axis, 0, tokens)
        return tensor

    def widened(self, rows: Tensor) -> Tensor:
        """What a block answers, (R, L, ...), at the length of the longest call."""
        return widened(rows, (1,), self.most)


def widened(x: Tensor, axes: Sequence[int], size: int) -> Tensor:
    """`x` with zeros at the ends of `axes`."""
    for axis in axes:
        behind = [0, 0] * (x.ndim - 1 - axis)
        x = pad(x, [*behind, 0, size - x.shape[axis]])
    return x


def of_one_length(found: Sequence[Seen]) -> tuple[list[Seen], Lengths | None]:
    """Calls as `cut_out` gives them, at the length of the longest; None where that cannot be.

    None, too, where all are as long.
    """
    sizes = [cut[0].shape[1] if cut and cut[0].ndim > 1 else 0 for _, cut, _ in found]
    most, template = max(sizes), found[0][0]
    alike = all(form == template and len(cut) == len(found[0][1]) for form, cut, _ in found)
    if len(set(sizes)) == 1 or not alike:
        return list(found), None
    longest = found[sizes.index(most)][1]
    axes, fixed, columns = dict[int, tuple[int, ...]](), set[int](), list[list[Tensor]]()
    for key, column in enumerate(zip(*(cut for _, cut, _ in found), strict=True)):
        own = _axes(column, sizes, flat=longest[key].ndim == 1)
        if own is None:
            return list(found), None
        axes[key] = own
        if _same(column, longest[key], own, sizes):
            fixed.add(key)
            columns.append([longest[key]] * len(found))
        else:
            columns.append([widened(t, own, most) for t in column])
    rows = [
        torch.full((len(cut[0]),), size) for (_, cut, _), size in zip(found, sizes, strict=True)
    ]
    cuts = [list(cut) for cut in zip(*columns, strict=True)]
    made = [(form, cut, row) for (form, _, row), cut in zip(found, cuts, strict=True)]
    return made, Lengths(torch.cat(rows), most, axes, frozenset(fixed))


def _axes(column: Sequence[Tensor], sizes: list[int], flat: bool) -> tuple[int, ...] | None:
    """The axes along which the tensors of one place have a number a token; None: others differ.

    flat: numbers a token without rows.
    """
    if len({t.ndim for t in column}) > 1:
        return None
    found = []
    for axis in range(0 if flat else 1, column[0].ndim):
        own = [t.shape[axis] for t in column]
        if len(set(own)) == 1:
            continue
        if own != sizes:
            return None
        found.append(axis)
    return tuple(found)


def _same(
    column: Sequence[Tensor], longest: Tensor, axes: tuple[int, ...], sizes: list[int]
) -> bool:
    """Whether a call's tensor is the beginning of the longest one, and there are no rows."""
    facts = Lengths(torch.empty(0), 0, {0: axes})
    cut = (facts.cut(0, longest, size) for size in sizes)
    return all(
        t.shape == other.shape and (t is longest or torch.equal(t, other))
        for t, other in zip(column, cut, strict=True)
    )
