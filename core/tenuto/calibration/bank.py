"""`Bank`: recorded inputs of a block, row by row."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..model import map_leaves, map_tensors

log = logging.getLogger("tenuto")


@dataclass
class Bank:
    """Recorded inputs of a block, row by row: R rows of every tensor that has a batch.

    template: (args, kwargs) in which a tensor is `Rows(key)`; tensors: key -> (R, ...); fixed: the
    tensors that are the same in every call. steps: int64 (R,), the calibrated step of each row.
    counted: (R, L), 1 where a token matters, or None.
    """

    template: tuple[tuple[Any, ...], dict[str, Any]]
    tensors: dict[int, Tensor]
    fixed: dict[int, Tensor]
    steps: Tensor
    counted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def rows(self, index: Tensor, device: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the block for the rows `index` (int64)."""
        index = index.to(self.steps.device)  # where the other tensors are
        chosen = {k: t.index_select(0, index) for k, t in self.tensors.items()} | self.fixed
        return _filled(self.template, {k: t.to(device) for k, t in chosen.items()})

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Row numbers in order, `size` at a time."""
        yield from torch.arange(len(self)).split(size)

    def advance(self, hidden: Tensor) -> Bank:
        """The bank of the next block of a chain: its first argument is this block's output."""
        return replace(self, tensors=self.tensors | {0: hidden})


@dataclass(frozen=True)
class Rows:
    """A place in a template that `Bank.tensors[key]` or `Bank.fixed[key]` fills."""

    key: int


def _filled(value: Any, tensors: dict[int, Tensor]) -> Any:
    def fill(leaf: Any, _: str) -> Any:
        return tensors[leaf.key] if isinstance(leaf, Rows) else leaf

    return map_leaves(fill, value, leaves=(Rows,))


def _cut(value: Any, found: list[Tensor]) -> Any:
    """`value` with each tensor taken out into `found`."""

    def cut(x: Tensor) -> Rows:
        found.append(x.detach().cpu())
        return Rows(len(found) - 1)

    return map_tensors(cut, value)


Seen = tuple[Any, list[Tensor], int]


def cut_out(arguments: tuple[tuple[Any, ...], dict[str, Any]], row: int) -> Seen:
    """(template, its tensors on the CPU, step) of one call with `arguments` = (args, kwargs)."""
    cut: list[Tensor] = []
    return _cut(arguments, cut), cut, row


def banked(block: str, found: Sequence[Seen]) -> Bank:
    """The calls that `block` got as one bank; see `inputs_of`."""
    shapes = [tuple(t.shape[1:] for t in cut) for _, cut, _ in found]
    usual = Counter(shapes).most_common(1)[0][0]
    kept = [f for f, s in zip(found, shapes, strict=True) if s == usual]
    if len(kept) < len(found):
        log.warning(
            "%d of %d calls have other shapes and are left out", len(found) - len(kept), len(found)
        )
    template = kept[0][0]
    if any(t != template for t, _, _ in kept):
        raise ModelError(f"{block} is called with other numbers at every step: round to nearest.")
    tensors, fixed = {}, {}
    for key, column in enumerate(zip(*(cut for _, cut, _ in kept), strict=True)):
        rows = _rows(block, column, [len(cut[0]) for _, cut, _ in kept])
        if rows is None:
            fixed[key] = column[0]
        else:
            tensors[key] = torch.cat(rows)
    steps = [torch.full((len(cut[0]),), row) for _, cut, row in kept]
    return Bank(template, tensors, fixed, torch.cat(steps))


def _rows(block: str, column: Sequence[Tensor], batches: list[int]) -> list[Tensor] | None:
    """One tensor of every call, row by row; None where it has no rows and never changes."""
    if all(t.ndim and len(t) == n for t, n in zip(column, batches, strict=True)):
        return list(column)
    if all(t.shape == column[0].shape and torch.equal(t, column[0]) for t in column):
        return None
    if any(not t.ndim or len(t) not in (1, n) for t, n in zip(column, batches, strict=True)):
        raise ModelError(f"{block} is called with other numbers at every step: round to nearest.")
    return [t.expand(n, *t.shape[1:]) for t, n in zip(column, batches, strict=True)]


def on_device(
    bank: Bank, target: Tensor | None, device: torch.device
) -> tuple[Bank, Tensor | None]:
    """Both on a GPU that has room for them twice over; else as they are.

    A batch a step from the CPU's memory costs more than the step of a small block does.
    """
    parts = [target, bank.steps, *bank.tensors.values(), *bank.fixed.values()]
    size = sum(t.nbytes for t in parts if t is not None)
    if device.type != "cuda" or 2 * size > torch.cuda.mem_get_info(device)[0]:
        return bank, target
    moved = replace(
        bank,
        tensors={k: t.to(device) for k, t in bank.tensors.items()},
        fixed={k: t.to(device) for k, t in bank.fixed.items()},
        steps=bank.steps.to(device),
    )
    return moved, None if target is None else target.to(device)
