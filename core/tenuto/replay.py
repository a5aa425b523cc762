"""Replay a recorded trajectory block by block: what each block saw, and what it answered."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .patching import place, tensors_in
from .trajectory import Call, to_device

log = logging.getLogger("tenuto")


class _Stop(Exception):  # leaves a forward once its block was reached
    pass


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
    if isinstance(value, Rows):
        return tensors[value.key]
    if isinstance(value, dict):
        return {k: _filled(v, tensors) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_filled(v, tensors) for v in value)
    return value


def _cut(value: Any, found: list[Tensor]) -> Any:
    """`value` with each tensor taken out into `found`."""
    if isinstance(value, Tensor):
        found.append(value.detach().cpu())
        return Rows(len(found) - 1)
    if isinstance(value, dict):
        return {k: _cut(v, found) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cut(v, found) for v in value)
    return value


def arguments(denoiser: nn.Module, call: Call, device: Any) -> dict[str, Any]:
    """What `call` passed, on `device`; half precision as the denoiser's own dtype."""
    _, dtype = place(denoiser)
    return to_device(call.inputs, device, dtype)


def run_to(denoiser: nn.Module, block: str, call: Call, device: Any) -> tuple[Any, Any]:
    """(args, kwargs) that `block` gets when `denoiser` is called as recorded; stops there."""
    seen: list[tuple[Any, Any]] = []

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise _Stop

    hook = denoiser.get_submodule(block).register_forward_pre_hook(
        stop, with_kwargs=True, prepend=True
    )
    try:
        denoiser(**arguments(denoiser, call, device))
    except _Stop:
        pass
    finally:
        hook.remove()
    if not seen:
        raise ModelError(f"The model was recorded, but did not call {block}.")
    return seen[0]


@torch.no_grad()
def inputs_of(denoiser: nn.Module, block: str, calls: Sequence[Call], device: Any) -> Bank:
    """What `block` gets in `calls` of `denoiser`, kept on the CPU.

    The first tensor says how many rows a call has. What all rows share, such as the embedding of
    a timestep, is given to each where it changes from call to call.
    Calls whose shapes differ from the most frequent ones are left out, with a word in the log.
    """
    found = []
    for call in calls:
        args, kwargs = run_to(denoiser, block, call, device)
        found.append(cut_out((tuple(args), dict(kwargs)), call.row))
    bank = banked(block, found)
    known = [call.counted for call in calls]
    rows = [t for t in known if t is not None]
    if len(rows) == len(known) and sum(map(len, rows)) == len(bank):  # and no call was left out
        bank.counted = torch.cat(rows)
    return bank


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


def on_device(bank: Bank, target: Tensor, device: torch.device) -> tuple[Bank, Tensor]:
    """Both on a GPU that has room for them twice over; else as they are.

    A batch a step from the CPU's memory costs more than the step of a small block does.
    """
    parts = [target, bank.steps, *bank.tensors.values(), *bank.fixed.values()]
    size = sum(t.nbytes for t in parts)
    if device.type != "cuda" or 2 * size > torch.cuda.mem_get_info(device)[0]:
        return bank, target
    moved = replace(
        bank,
        tensors={k: t.to(device) for k, t in bank.tensors.items()},
        fixed={k: t.to(device) for k, t in bank.fixed.items()},
        steps=bank.steps.to(device),
    )
    return moved, target.to(device)


@torch.no_grad()
def outputs(block: nn.Module, bank: Bank, device: Any, size: int = 32) -> Tensor:
    """The outputs of `block` on every row of `bank`, (R, ...), kept on the CPU."""
    found = []
    for index in bank.chunks(size):
        args, kwargs = bank.rows(index, device)
        found.append(first_tensor(block(*args, **kwargs)).cpu())
    return torch.cat(found)


def first_tensor(out: Any) -> Tensor:
    """The main output of a block: the tensor itself or the first one of a tuple."""
    return next(tensors_in(out))


@torch.no_grad()
def is_chain(denoiser: nn.Module, blocks: Sequence[str], call: Call, device: Any) -> bool:
    """Whether each block gets the last one's output and otherwise the very same objects."""
    seen: list[tuple[list[int], int]] = []
    hooks = []

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        tensors = list(tensors_in((args, kwargs)))
        seen.append(([id(t) for t in tensors], id(first_tensor(out))))
        keep.extend([*tensors, first_tensor(out)])

    keep: list[Tensor] = []
    for name in blocks:
        hooks.append(denoiser.get_submodule(name).register_forward_hook(note, with_kwargs=True))
    try:
        denoiser(**arguments(denoiser, call, device))
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(blocks):
        return False
    steps = range(1, len(seen))
    chained = (seen[i][0][0] == seen[i - 1][1] for i in steps)
    return all(chained) and all(seen[i][0][1:] == seen[0][0][1:] for i in steps)


def in_order(denoiser: nn.Module, names: Sequence[str], call: Call, device: Any) -> list[str]:
    """`names` of submodules in the order in which `call` first reaches them, others last."""
    seen: dict[str, None] = {}
    hooks = [
        denoiser.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: seen.setdefault(n))
        for n in names
    ]
    try:
        with torch.no_grad():
            denoiser(**arguments(denoiser, call, device))
    finally:
        for hook in hooks:
            hook.remove()
    return [*seen, *(n for n in names if n not in seen)]


class Chain:
    """Inputs and targets of one block after another, while `model` is quantized block by block.

    Where every block feeds the next one, outputs are handed on; else each block's inputs are
    replayed from the start of the model. Only blocks that need data cost anything.
    blocks: all of the model's, in order. units: those that are quantized. needy: those with data.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        units: Sequence[str],
        needy: Collection[str | None],
        calls: Sequence[Call],
        device: Any,
    ) -> None:
        self.model, self.reference = model, copy.deepcopy(model)
        self.blocks, self.calls, self.device = list(units), calls, device
        self.last = max((place for place, b in enumerate(self.blocks) if b in needy), default=-1)
        whole = list(blocks) == self.blocks  # a block without layers to quantize breaks the chain
        self.linear = self.last > 0 and whole and is_chain(model, blocks, calls[0], device)
        self.student: Bank | None = None
        self.teacher: Bank | None = None
        self.target: Tensor | None = None

    def data(self, block: str) -> tuple[Bank, Tensor]:
        """(inputs from the quantized prefix, outputs in full precision) of `block`."""
        stale = not self.linear and self.target is None
        if self.student is None or self.teacher is None or stale:
            self.student = inputs_of(self.model, block, self.calls, self.device)
            self.teacher = inputs_of(self.reference, block, self.calls, self.device)
        if self.target is None:
            reference = self.reference.get_submodule(block)
            self.target = outputs(reference, self.teacher, self.device)
        return self.student, self.target

    def passed(self, block: str) -> None:
        """`block` is quantized: go on to the next one."""
        if block not in self.blocks or self.blocks.index(block) >= self.last:
            return
        if self.linear:
            student, target = self.data(block)
            out = outputs(self.model.get_submodule(block), student, self.device)
            assert self.teacher is not None
            self.student, self.teacher = student.advance(out), self.teacher.advance(target)
        self.target = None
