"""`Answers`: what a model's blocks answered in recorded calls, so that no replay computes it again.

Where blocks do not simply feed each other (skip connections, two streams), the model is run up to a
block to see what that gets. With the answers of the blocks before it in their places only what lies
between the blocks is computed: all replays together compute each block once a call, and not once
for every block behind it. An answer is kept until no block can get anything of it any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ModelError
from ..files import bits_of
from ..model import Leave, override_, tensors_in, watched
from .bank import Seen, cut_out, whole
from .bank_files import BankFiles, Columns
from .by_block import unfilled

Run = Callable[[], None]  # one call of the model, as recorded


@dataclass(frozen=True)
class Flow:
    """How a model goes through its blocks.

    order: the places where inputs are looked at, blocks among them, as a call reaches them. last:
    of each block, the number of the last place there that gets something of its answer other than
    through another block. size: bytes of the answers of one call that are needed at once, at most.
    """

    order: tuple[str, ...]
    last: dict[str, int]
    size: int


@dataclass
class Answers:
    """The answers of the blocks of `model` that are quantized, and of those before them.

    files, calls: where they go that memory has no room for, and how many calls' answers these are.
    kept: number of the call -> block -> its answer, as `cut_out` gives it, or one of zeros where
    nobody gets it any more.
    """

    model: nn.Module
    flow: Flow
    files: BankFiles | None = None
    calls: int = 1
    kept: dict[int, dict[str, Seen]] = field(default_factory=dict)
    columns: dict[str, Columns] = field(default_factory=dict)  # of each block, where files are used

    @contextmanager
    def before(self, place: str, number: int, device: Any) -> Iterator[None]:
        """Within, call `number` goes up to `place` by what is known; what was not yet is noted."""
        end = self.flow.order.index(place)
        known = self.kept.setdefault(number, {})
        new: dict[str, Seen] = {}

        def gone(name: str) -> bool:
            return self.flow.last[name] < end

        def keep(name: str, answer: Seen) -> Seen:
            return zeros(answer) if gone(name) else self._put(name, answer)

        ahead = [name for name in self.flow.order[:end] if name in self.flow.last]
        there = {name: known[name] for name in ahead if name in known}
        left = [name for name in ahead if name not in known]
        with standing(self.model, there, device), noted(self.model, left, new, keep):
            yield
        known |= new
        for name in [name for name in known if gone(name)]:
            known[name] = zeros(known[name])

    def ahead(self, place: str) -> list[str]:
        """The blocks before `place` that the next call up to it computes."""
        end, known = self.flow.order.index(place), next(iter(self.kept.values()), {})
        return [n for n in self.flow.order[:end] if n in self.flow.last and n not in known]

    def size(self) -> int:
        """Bytes of what is kept."""
        every = (x for known in self.kept.values() for answer in known.values() for x in answer[1])
        return sum(x.nbytes for x in every if x.numel() < 2 or any(x.stride()))

    def _put(self, name: str, answer: Seen) -> Seen:
        form, tensors, row = answer
        if self.files is None or not self.files.used:
            return form, [t.clone() for t in tensors], row  # the model may write into its own
        if name not in self.columns:
            self.columns[name] = Columns(self.files, self.calls)
        return form, self.columns[name].put(tensors), row


@contextmanager
def standing(
    model: nn.Module, answers: dict[str, Seen], device: Any, given: Any = None
) -> Iterator[None]:
    """Within, the blocks do not compute, but give a copy of these answers; they get no weights.

    given: called with the name and the answer of each copy.
    """
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(unfilled(model.get_submodule(name)))
            patch = override_(model.get_submodule(name), _standing(name, answer, device, given))
            stack.callback(patch.remove)
        yield


def _standing(name: str, answer: Seen, device: Any, given: Any) -> Callable[..., Any]:
    def forward(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        form, tensors, row = answer
        ((out,), _) = whole((form, [t.to(device, copy=True) for t in tensors], row))
        if given is not None:
            given(name, out)
        return out

    return forward


@contextmanager
def noted(
    model: nn.Module, names: Sequence[str], found: dict[str, Seen], put: Callable[[str, Seen], Seen]
) -> Iterator[None]:
    """Within, what these blocks answer is put into `found`, as `put` gives it."""

    def note(name: str, args: Any, kwargs: Any, out: Any) -> None:
        found[name] = put(name, cut_out(((out,), {}), 0))

    with watched(model, names, after=note):
        yield


def zeros(answer: Seen) -> Seen:
    """An answer of the same shapes, which takes no memory."""
    form, tensors, row = answer
    return form, [torch.zeros((), dtype=t.dtype).expand(t.shape) for t in tensors], row


# --- how a model goes through its blocks ----------------------------------------------------------


@torch.no_grad()
def flow_of(
    model: nn.Module, blocks: Sequence[str], places: Sequence[str], run: Run, device: Any
) -> Flow | None:
    """How `run`, one call, goes through the blocks; None where they cannot stand still.

    That is where a block is called more than once or not at all, in another order than that of
    `blocks`, or where what a place gets is not the same, byte by byte, with answers in the place
    of the blocks before it: one that writes into its inputs, say. places: the blocks, and what
    else inputs are looked at of. Takes two calls, and of answers no more memory than replays do.
    """
    try:
        order, marks, shapes = _whole_call(model, blocks, places, run)
        if [name for name in order if name in set(blocks)] != list(blocks):
            return None
        with Origins() as origins, standing(model, shapes, device, origins.begin):
            reached = _reached(model, places, origins, run)
        last = {name: order.index(name) for name in blocks}
        for place, found in reached.items():
            for name in found:
                last[name] = max(last[name], order.index(place))
        tried, most = Answers(model, Flow(tuple(order), last, 0)), 0
        for place in order:
            with tried.before(place, 0, device):
                if _mark_at(model, place, run) != marks[place]:
                    return None
            most = max(most, tried.size())
    except (ModelError, RuntimeError, ValueError, LookupError, AssertionError):
        return None  # it does not take zeros, or what it passes on cannot be kept
    return Flow(tuple(order), last, most)


def _whole_call(
    model: nn.Module, blocks: Sequence[str], places: Sequence[str], run: Run
) -> tuple[list[str], dict[str, str], dict[str, Seen]]:
    """Blocks as often as they are called, other places once; marks of inputs; zeros as answers."""
    order, marks, shapes = list[str](), dict[str, str](), dict[str, Seen]()

    def none(name: str, answer: Seen) -> Seen:
        return zeros(answer)

    def note(name: str, args: Any, kwargs: Any) -> None:
        if name in blocks or name not in marks:
            order.append(name)
            marks[name] = _mark((args, kwargs))

    with watched(model, places, before=note, first=True), noted(model, blocks, shapes, none):
        run()
    return order, marks, shapes


def _mark_at(model: nn.Module, place: str, run: Run) -> str:
    """The mark of what `place` gets."""
    found: list[str] = []

    def stop(name: str, args: Any, kwargs: Any) -> None:
        found.append(_mark((args, kwargs)))
        raise Leave

    with watched(model, [place], before=stop, first=True), suppress(Leave):
        run()
    return "".join(found)


def _mark(value: Any) -> str:
    """A hash of the bytes of all tensors in `value`."""
    found = hashlib.sha256()
    for x in tensors_in(value):
        found.update(f"{x.dtype} {tuple(x.shape)};".encode())
        found.update(bits_of(x).numpy().data)
    return found.hexdigest()


def _reached(
    model: nn.Module, places: Sequence[str], origins: Origins, run: Run
) -> dict[str, set[str]]:
    """Of each place the blocks whose answers it gets something of."""
    found: dict[str, set[str]] = {}

    def note(name: str, args: Any, kwargs: Any) -> None:
        found.setdefault(name, set()).update(origins.of((args, kwargs)))

    with watched(model, places, before=note, first=True):
        run()
    return found


class Origins(TorchDispatchMode):
    """Within, every tensor knows of which blocks' answers it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, set[str]]] = {}  # by storage: views share it

    def begin(self, name: str, answer: Any) -> None:
        """`answer` is that of the block `name`."""
        for x in tensors_in(answer):
            self._add(x, {name})

    def of(self, value: Any) -> set[str]:
        """The blocks behind the tensors in `value`."""
        numbers = (x.untyped_storage()._cdata for x in tensors_in(value))
        return set[str]().union(*(self.known[n][1] for n in numbers if n in self.known))

    def _add(self, x: Tensor, names: set[str]) -> None:
        storage = x.untyped_storage()  # while it is referred to none other gets its number
        _, known = self.known.setdefault(storage._cdata, (StorageWeakRef(storage), set()))
        known.update(names)
        for number in [n for n, (ref, _) in self.known.items() if ref.expired()]:
            del self.known[number]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = self.of((args, kwargs))
        if names:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            written = [
                (named | (kwargs or {})).get(a.name)
                for a in func._schema.arguments
                if a.alias_info is not None and a.alias_info.is_write
            ]
            for x in tensors_in((out, written)):
                self._add(x, names)
        return out
