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
from ..model import map_leaves
from .bank_files import BankFiles, Columns
from .lengths import Lengths, of_one_length

log = logging.getLogger("tenuto")


@dataclass
class Bank:
    """Recorded inputs of a block, row by row: R rows of every tensor that has a batch.

    template: (args, kwargs) in which a tensor is `Rows(key)`; tensors: key -> (R, ...); fixed: the
    tensors that are the same in every call. steps: int64 (R,), the calibrated step of each row.
    counted: (R, L), 1 where a token matters, or None. inner: keys of tensors whose rows are along
    the second axis of what the block gets.
    calls: where a call cannot be taken apart (frames in its batch, two times a sample), each row is
    a whole call, with its own template here and tensors (R, rows of the call, ...).
    files: where the tensors are, and what the block answers is to be; None: in memory.
    lengths: of the rows, where they have several: those of a part (`parts`) have one.
    weights: float32 (R,), what the errors of each row count, 1 in the mean; None: all the same.
    """

    template: Template
    tensors: dict[int, Tensor]
    fixed: dict[int, Tensor]
    steps: Tensor
    counted: Tensor | None = None
    calls: tuple[Template, ...] = ()
    inner: tuple[int, ...] = ()
    files: BankFiles | None = None
    lengths: Lengths | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def rows(self, index: Tensor, device: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the block for the rows `index` (int64); see `parts`."""
        index = index.to(self.steps.device)  # where the other tensors are
        chosen = {k: self.of(t, index) for k, t in self.tensors.items()}
        fixed = self.fixed
        if self.lengths is not None:
            tokens = self.lengths.of(index)
            chosen = {k: self.lengths.cut(k, t, tokens) for k, t in chosen.items()}
            fixed = {k: self.lengths.cut(k, t, tokens) for k, t in fixed.items()}
        turned = {k: t.transpose(0, 1) if k in self.inner else t for k, t in chosen.items()}
        moved = {k: t.to(device) for k, t in (turned | fixed).items()}
        return _filled(self.calls[int(index)] if self.calls else self.template, moved)

    def of(self, tensor: Tensor, index: Tensor) -> Tensor:
        """The rows `index` of a tensor of the bank, or of what the block answered to it."""
        found = tensor.index_select(0, index.to(tensor.device))
        self.forget()
        return found.squeeze(0) if self.calls else found

    def length(self, index: Tensor) -> int:
        """Tokens of each row of `index`, one part of `parts`; 1 where no row has others."""
        return 1 if self.lengths is None else self.lengths.of(index)

    def answers(self, target: Tensor, index: Tensor) -> Tensor:
        """The rows `index` of what the block answered, as long as they are."""
        found = self.of(target, index)
        return found if self.lengths is None else found[:, : self.lengths.of(index)]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be written, in files where the bank is."""
        if self.files is None:
            return torch.empty(shape, dtype=dtype)
        return self.files.empty(shape, dtype)

    def forget(self) -> None:
        """See `BankFiles.forget`."""
        if self.files is not None:
            self.files.forget()

    def parts(self, index: Tensor, size: int) -> Iterator[Tensor]:
        """`index` in parts that one call of the block takes: `size` rows, or one whole call."""
        for run in [index] if self.lengths is None else self.lengths.runs(index):
            yield from run.split(1 if self.calls else size)

    def part(self, index: Tensor) -> Bank:
        """The rows `index` (int64) alone."""
        index = index.to(self.steps.device)
        return replace(
            self,
            tensors={k: t.index_select(0, index) for k, t in self.tensors.items()},
            steps=self.steps[index],
            counted=None if self.counted is None else self.counted[index.cpu()],
            calls=tuple(self.calls[i] for i in index.tolist()) if self.calls else (),
            lengths=self.lengths and self.lengths.part(index),
            weights=None if self.weights is None else self.weights[index.cpu()],
        )

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Row numbers in order, `size` at a time; see `parts`."""
        yield from self.parts(torch.arange(len(self)), size)

    def enough(self, rows: int) -> int:
        """How many rows of the bank are `rows` rows of the block's input, at least one."""
        return max(1, rows // self.tensors[0].shape[1]) if self.calls else rows

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
    """`value` with each tensor taken out into `found`, and what remembers earlier calls left out.

    A cache of keys and values grows at every call of a block, which is called again and again with
    the same inputs: what it was filled with in one call would be looked at in the next.
    """

    def cut(x: Any, name: str) -> Any:
        if is_cache(x):
            if x.get_seq_length():
                raise ModelError(
                    f"A block is called with keys and values of earlier calls{_in(name)}: its "
                    "inputs cannot be replayed, so round to nearest."
                )
            return None
        if not isinstance(x, Tensor):
            return x
        found.append(x.detach().cpu())
        return Rows(len(found) - 1)

    return map_leaves(cut, value)


def is_cache(value: Any) -> bool:
    """Whether `value` is a cache of keys and values of transformers."""
    return callable(getattr(value, "get_seq_length", None)) and callable(
        getattr(value, "update", None)
    )


def _in(name: str) -> str:
    key = name.strip(".").rpartition(".")[2]
    return f", in {key}" if key else ""


Template = tuple[tuple[Any, ...], dict[str, Any]]
Seen = tuple[Any, list[Tensor], int]


def cut_out(arguments: tuple[tuple[Any, ...], dict[str, Any]], row: int) -> Seen:
    """(template, its tensors on the CPU, step) of one call with `arguments` = (args, kwargs)."""
    cut: list[Tensor] = []
    return _cut(arguments, cut), cut, row


def whole(seen: Seen) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call again, with its tensors where they were cut out."""
    return _filled(seen[0], dict(enumerate(seen[1])))


def banked(
    block: str, found: Sequence[Seen], files: BankFiles | None = None, texts: bool = False
) -> Bank:
    """The calls that `block` got as one bank, row by row; ModelError where they have no rows.

    files: where it is to be. texts: calls may have several lengths.
    """
    inner = _inner([cut for _, cut, _ in found])
    found = [(form, _turned(cut, inner), row) for form, cut, row in found]
    found, lengths = of_one_length(found) if texts else (found, None)
    alike = lengths.fixed if lengths else frozenset()
    kept = _alike(found, [tuple(t.shape[1:] for t in cut) for _, cut, _ in found])
    template = kept[0][0]
    if any(t != template for t, _, _ in kept):
        raise ModelError(f"{block} is called with other numbers at every step: round to nearest.")
    tensors, fixed = {}, {}
    for key, column in enumerate(zip(*(cut for _, cut, _ in kept), strict=True)):
        sizes = [len(cut[0]) for _, cut, _ in kept]
        rows = None if key in alike else _rows(block, column, sizes)
        if rows is None:
            fixed[key] = _alone(column[0], files)
        else:
            tensors[key] = _together(rows, files)
    steps = [torch.full((len(cut[0]),), row) for _, cut, row in kept]
    return Bank(
        template, tensors, fixed, torch.cat(steps), inner=inner, files=files, lengths=lengths
    )


def _inner(calls: Sequence[list[Tensor]]) -> tuple[int, ...]:
    """Keys of tensors with rows along their second axis: (3, B, ...), places of Qwen-VL's."""
    sizes = [len(cut[0]) for cut in calls]
    if all(n in (1, 3) for n in sizes):
        return ()
    found = zip(*calls, strict=False)
    return tuple(
        key
        for key, column in enumerate(found)
        if all(t.ndim > 2 and t.shape[:2] == (3, n) for t, n in zip(column, sizes, strict=True))
    )


def _turned(cut: list[Tensor], inner: tuple[int, ...]) -> list[Tensor]:
    return [t.transpose(0, 1) if key in inner else t for key, t in enumerate(cut)]


def _together(rows: Sequence[Tensor], files: BankFiles | None) -> Tensor:
    return torch.cat(list(rows)) if files is None else files.joined(rows)


def _alone(tensor: Tensor, files: BankFiles | None) -> Tensor:
    """Of all calls that one: in a file of its own, so that the one that has all of them can end."""
    return tensor if files is None else Columns(files, 1).put([tensor])[0]


def banked_by_call(found: Sequence[Seen], files: BankFiles | None = None) -> Bank:
    """The same with a whole call as each row, whatever its tensors have as a first dimension."""
    kept = _alike(found, [tuple(t.shape for t in cut) for _, cut, _ in found])
    tensors, fixed = {}, {}
    for key, column in enumerate(zip(*(cut for _, cut, _ in kept), strict=True)):
        if key and all(torch.equal(t, column[0]) for t in column):
            fixed[key] = _alone(column[0], files)
        else:
            tensors[key] = _together([t[None] for t in column], files)
    steps = torch.tensor([row for _, _, row in kept])
    templates = tuple(template for template, _, _ in kept)
    return Bank(kept[0][0], tensors, fixed, steps, calls=templates, files=files)


def _alike(found: Sequence[Seen], shapes: Sequence[Any]) -> list[Seen]:
    """The calls of the most frequent shapes, with a word in the log where that is not all."""
    usual = Counter(shapes).most_common(1)[0][0]
    kept = [f for f, s in zip(found, shapes, strict=True) if s == usual]
    if len(kept) < len(found):
        log.warning(
            "%d of %d calls have other shapes and are left out", len(found) - len(kept), len(found)
        )
    return kept


def fits(call: Seen, bank: Bank) -> bool:
    """Whether a bank of rows has those of `call`: the shapes of its tensors but for the first."""
    known, cut = bank.tensors | bank.fixed, _turned(call[1], bank.inner)
    return all(t.shape[1:] == known[key].shape[1:] for key, t in enumerate(cut))


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
