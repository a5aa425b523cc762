"""`Chain`: inputs and targets of one block after another, while a model is quantized."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Leave, tensors_in, watched
from ..sampling import Call, processes
from .answers import Answers, flow_of
from .bank import Bank
from .bank_files import BankFiles
from .by_block import held
from .replay import arguments, first_tensor, inputs_of, outputs

FEW = 2  # blocks with data, for which the model is simply run up to each


class Chain:
    """Inputs and targets of one block after another, while `model` is quantized block by block.

    Where every block feeds the next one, outputs are handed on; else the model is run up to each
    block, with what is known of those before it, see `Answers`. Only blocks that need data cost
    anything, and nothing is computed before they are asked for: a job that goes on may have them.
    blocks: all of the model's, in order. units: those that are quantized. needy: those with data.
    plain: gives the full-precision model, whose outputs are the targets; None: there are none.
    files: where inputs and targets go that memory has no room for. wanted: the calls of which there
    are targets; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        units: Sequence[str],
        needy: Collection[str | None],
        calls: Sequence[Call],
        device: Any,
        plain: Callable[[], nn.Module] | None,
        files: BankFiles | None = None,
        wanted: Sequence[Call] | None = None,
    ) -> None:
        self.wanted = calls if wanted is None else wanted
        self.blocks, self.calls, self.device, self.files = list(units), calls, device, files
        self.every, self.needy, self.model, self.plain = list(blocks), set(needy), model, plain
        self.student: Bank | None = None
        self.teacher: Bank | None = None
        self.target: Tensor | None = None
        self.at: str | None = None  # the block whose data these are

    @cached_property
    def reference(self) -> nn.Module | None:
        """The model in full precision."""
        return None if self.plain is None else self.plain()

    @cached_property
    def linear(self) -> bool:
        """Whether outputs are handed on."""
        if self.every != self.blocks or not self.needy.intersection(self.blocks[1:]):
            return False  # a block without layers to quantize breaks the chain
        return is_chain(self.model, self.every, self.calls[0], self.device)

    @cached_property
    def answers(self) -> dict[nn.Module | None, Answers]:
        """What blocks answer, where they can stand still and there is room for it."""
        if self.linear or len(self.needy.intersection(self.blocks)) <= FEW:
            return {}
        places = list(dict.fromkeys((*self.every, *self.blocks)))
        flow = flow_of(
            self.model, self.every, places,
            lambda: self.model(**arguments(self.model, self.calls[0], self.device)), self.device,
        )  # fmt: skip
        if flow is None:
            return {}
        models = [m for m in (self.model, self.reference) if m is not None]
        calls = -(-len(self.calls) // processes().size)  # each keeps those that it computes
        if self.files is not None and not self.files.reserve(len(models) * calls * flow.size):
            return {}
        return {m: Answers(m, flow, self.files, calls) for m in models}

    def data(self, block: str) -> tuple[Bank, Tensor | None]:
        """(inputs from the quantized prefix, outputs in full precision) of `block`.

        Blocks come in order; of a chain all before it are quantized by then.
        """
        if self.at is None or not (self.linear or self.at == block):
            self._replay(self.blocks[0] if self.linear else block)
        while self.at != block:
            self._hand_on()
        assert self.student is not None
        return self.student, self.target

    def _replay(self, block: str) -> None:
        """Take what `block` gets from the calls of the models."""
        self._forget()  # memory for the next ones
        if self.files is not None:
            self.files.chosen = False  # blocks are of several sizes
        self.student = self._inputs(self.model, block)
        if self.reference is not None:
            self.teacher = self._inputs(self.reference, block, bool(self.student.calls))
        self._answer(block)

    def _inputs(self, model: nn.Module, block: str, by_call: bool | None = None) -> Bank:
        answers = self.answers.get(model)
        if answers is not None and block not in answers.flow.order:
            answers = None
        calls = self.calls if model is self.model else self.wanted
        ahead = [] if answers is None else answers.ahead(block)
        with ExitStack() as stack:
            if len(ahead) == 1:  # more than one may be more than memory
                stack.enter_context(held(model.get_submodule(ahead[0])))
            return inputs_of(model, block, calls, self.device, by_call, self.files, answers)

    def _answer(self, block: str) -> None:
        """`block` is next: what it answers in full precision."""
        self.at, self.target = block, None
        if self.reference is not None:
            assert self.teacher is not None
            target = self.reference.get_submodule(block)
            self.target = outputs(target, self.teacher, self.device)

    def _hand_on(self) -> None:
        """What the block answers is what the next one gets."""
        assert self.student is not None and self.at is not None
        out = outputs(self.model.get_submodule(self.at), self.student, self.device)
        self.student = self.student.advance(out)
        if self.teacher is not None and self.target is not None:
            self.teacher = self.teacher.advance(self.target)
        self._answer(self.blocks[self.blocks.index(self.at) + 1])

    def passed(self, block: str) -> None:
        """`block` is quantized: what no other block needs makes room."""
        if block != self.at:
            return
        last = not self.needy.intersection(self.blocks[self.blocks.index(block) + 1 :])
        if last or not self.linear:
            self._forget()
        if last:
            self.answers.clear()

    def _forget(self) -> None:
        self.student = self.teacher = self.target = self.at = None


@torch.no_grad()
def is_chain(denoiser: nn.Module, blocks: Sequence[str], call: Call, device: Any) -> bool:
    """Whether each block gets the last one's output and otherwise the very same objects."""
    first: list[Tensor] = []  # the other tensors that the first block gets
    last: list[Tensor] = []  # what the last one answered; both stay alive, so that `is` tells
    count, broken = 0, False

    def note(name: str, args: Any, kwargs: Any, out: Any) -> None:
        nonlocal count, broken
        hidden, *others = tensors_in((args, kwargs))
        if not count:
            first[:] = others
        same = len(others) == len(first) and all(map(operator.is_, others, first))
        if count and not (hidden is last[0] and same):
            broken = True
            raise Leave
        last[:] = [first_tensor(out)]
        count += 1

    with watched(denoiser, blocks, after=note), suppress(Leave):
        denoiser(**arguments(denoiser, call, device))
    return count == len(blocks) and not broken
