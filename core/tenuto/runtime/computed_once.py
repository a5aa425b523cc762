"""`Once`: what a denoiser computes of its prompt alone is computed once, exactly.

The keys and values of cross-attention, and what embeds a prompt, get the same input at every step.
A layer answers with what it answered before where its input is the same memory, not written to
since: an argument of the denoiser (not the sample, nor what is other at every step), or what such a
layer answered itself. Nothing is compared on the device, and nothing is assumed of the model.
"""

from __future__ import annotations

import copy
import functools
import operator
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model import (
    Override,
    Signature,
    override_,
    own_modules,
    tensors_in,
)
from ..sampling import Clock
from .kernels.quantize_input import compiling
from .same_memory import key_of, place_of, plain, state_of, unusual, versions

MOST = 8  # inputs of a layer that are kept: streams of guidance, and prompts by turns


@dataclass(eq=False)
class Source:
    """An argument of the denoiser, alive as long as its caller has it. place: of its memory."""

    argument: weakref.ref[Tensor]
    place: int

    def there(self) -> bool:
        """Whether it still is that memory."""
        found = self.argument()
        return found is not None and place_of(found) == self.place


@dataclass(eq=False)
class Answer:
    """What a layer said to an input. kept: the input, where it is no argument's memory.

    sources: the arguments that it is made of. out: tensors; versions: theirs.
    """

    sources: tuple[Source, ...]
    kept: Tensor | None
    out: Any
    versions: tuple[int, ...]
    state: tuple[Any, ...]

    def holds(self, sources: tuple[Source, ...], state: tuple[Any, ...]) -> bool:
        """Whether it would be said again: nobody wrote to it, nor exchanged a weight."""
        same = len(sources) == len(self.sources) and all(map(operator.is_, sources, self.sources))
        return same and self.state == state and versions(self.out) == self.versions


class Once:
    """Whose memory is whose, in the calls of one denoiser: a patch, which sees every call first.

    cells: what answers once, by kind and name. given: all arguments of the call but the sample and
    the timestep, as (sources, keys); None where they are no ordinary tensors. An argument that its
    caller lets go of takes with it what was made of it, and nothing outlives a run where `clock`
    knows of runs, nor a change of adapters: these write to weights so that nobody sees it. One
    thread at a time: what calls meanwhile computes as ever.
    """

    def __init__(
        self, denoiser: nn.Module, cells: Mapping[str, type[Cell]], clock: Clock | None = None
    ) -> None:
        self.facts, self.clock = Signature(denoiser), clock
        self._start()
        self._moving: dict[str, bool] = {}  # by the name of an argument
        self.sources: dict[int, Source] = {}  # by the place of memory, of arguments and answers
        self.cells: list[Cell] = []
        self.patches: list[Override] = []
        modules = dict(own_modules(denoiser))
        self.calls = 0
        self.given: tuple[tuple[Source | None, ...], tuple[Any, ...]] | None = None
        self.whole = any(kind is not Cell for kind in cells.values())  # somebody asks for these
        for name, kind in cells.items():
            self.cells.append(kind(self))
            self.patches.append(override_(modules[name], self.cells[-1]))
        self.patches.append(override_(denoiser, self))

    def _start(self) -> None:
        self.lock, self.thread = threading.RLock(), 0
        self._adapters: tuple[Any, ...] = ()
        self._wrapped: list[Any] = []
        self._latest: tuple[Any, ...] = ()

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if compiling() or not self.lock.acquire(blocking=False):
            return original(*args, **kwargs)
        try:
            self.thread = threading.get_ident()
            latest = None if self.clock is None else self.clock.run, self._merged(module)
            if latest != self._latest:
                self.clear()
                self._latest = latest
            self._look(args, kwargs)
            return original(*args, **kwargs)
        finally:
            self.thread = 0
            self.lock.release()

    def _merged(self, denoiser: nn.Module) -> tuple[Any, ...]:
        """The adapters that a denoiser has, and how many of them are in its weights."""
        found = tuple(getattr(denoiser, "peft_config", None) or ())
        if found != self._adapters:
            wrapped = denoiser.modules() if found else ()
            self._wrapped = [m for m in wrapped if hasattr(m, "merged_adapters")]
            self._adapters = found
        return found, sum(len(m.merged_adapters) for m in self._wrapped)

    def mine(self) -> bool:
        """Whether this thread is in the call that was looked at."""
        return self.thread == threading.get_ident()

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the arguments of a call."""
        self.given = None
        if torch.is_grad_enabled():
            return
        tensors = list(self._conditions(args, kwargs))
        for tensor in tensors:
            if plain(tensor):
                self._argument(tensor)
        self.calls += 1
        if self.whole and all(map(plain, tensors)) and not self._adapters:
            parts = [m for patch in self.patches[:-1] for m in patch.module.modules()]
            if any(m._forward_hooks or m._forward_pre_hooks for m in parts):
                return  # one hands on what it was given by another: all of them count
            state = tuple(state_of(m) for m in parts)
            self.given = tuple(map(self.source, tensors)), (*map(key_of, tensors), state)

    def _conditions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
        """As `Signature.conditions`, in a tenth of the time."""
        positional = zip(self.facts.names, args, strict=False)
        for name, value in (*positional, *kwargs.items()):
            moving = self._moving.get(name)
            if moving is None:
                moving = self._moving[name] = self.facts.moves(name)
            if value is None or moving:
                continue
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple | dict):
                yield from tensors_in(value)

    def _argument(self, tensor: Tensor) -> None:
        place = place_of(tensor)
        known = self.sources.get(place)
        if not place or (known is not None and known.there()):
            return
        if known is not None:
            self.drop(known)
        gone = functools.partial(_gone, weakref.ref(self), place)
        self.sources[place] = Source(weakref.ref(tensor, gone), place)

    def source(self, x: Tensor) -> Source | None:
        """Of whose memory `x` is made, if it is of a prompt."""
        found = self.sources.get(place_of(x))
        return found if found is not None and found.there() else None

    def drop(self, source: Source) -> None:
        """Let go of all that was made of an argument."""
        for cell in self.cells:
            for key, answer in list(cell.answers.items()):  # called whenever an argument goes
                if any(source is known for known in answer.sources):
                    cell.forget(key)
        for place, known in list(self.sources.items()):
            if known is source:
                self.sources.pop(place, None)

    def clear(self) -> None:
        """Let go of everything."""
        for cell in self.cells:
            cell.answers.clear()
        self.sources.clear()

    def counts(self) -> list[int]:
        """[computed, answered from memory] calls of its layers."""
        return [sum(cell.counts[i] for cell in self.cells) for i in (0, 1)]

    def size(self) -> int:
        """Bytes of the answers that are kept."""
        return sum(
            t.nbytes for c in self.cells for a in c.answers.values() for t in tensors_in(a.out)
        )

    def remove(self) -> None:
        """Leave the model as it was."""
        for patch in reversed(self.patches):
            patch.retire()
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Once:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.facts, clone.sources = self.facts, {}
        clone.clock = copy.deepcopy(self.clock, memo)
        clone._start()
        clone.calls, clone.given, clone.whole, clone._moving = 0, None, self.whole, {}
        clone.cells = copy.deepcopy(self.cells, memo)
        clone.patches = copy.deepcopy(self.patches, memo)
        return clone


class Cell:
    """The forward of one layer, which answers once. counts: [computed, answered from memory]."""

    def __init__(self, once: Once) -> None:
        self.once, self.counts = once, [0, 0]
        self.answers: dict[tuple[Any, ...], Answer] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Cell:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.once, clone.counts, clone.answers = copy.deepcopy(self.once, memo), [0, 0], {}
        return clone

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        able = not compiling() and self.once.mine() and not kwargs and len(args) == 1
        if not able or not plain(args[0]) or unusual(args[0]):
            return original(*args, **kwargs)
        return self._answer(original, module, args[0])

    def _answer(self, original: Any, module: nn.Module, x: Tensor) -> Any:
        source = self.once.source(x)
        if source is None:
            self.counts[0] += 1
            return original(x)
        key, state = key_of(x), state_of(module)
        found = self.answers.get(key)
        if found is not None and found.holds((source,), state):
            return self.again(key, found)
        self.counts[0] += 1
        out = original(x)
        if plain(out) and place_of(out) != place_of(x):
            kept = None if place_of(x) == source.place else x  # the argument must be able to go
            self.keep(key, Answer((source,), kept, out, versions(out), state_of(module)))
            self.once.sources[place_of(out)] = source
        return out

    def again(self, key: tuple[Any, ...], found: Answer) -> Any:
        """The same answer; the latest is the last to go."""
        self.counts[1] += 1
        self.answers.pop(key, None)
        self.answers[key] = found
        return found.out

    def keep(self, key: tuple[Any, ...], answer: Answer) -> None:
        """One more answer, or another one to the same."""
        self.forget(key)
        if len(self.answers) >= MOST:
            self.forget(next(iter(self.answers)))
        self.answers[key] = answer

    def forget(self, key: tuple[Any, ...]) -> None:
        """Let go of one answer, whose memory is nobody's then."""
        gone = self.answers.pop(key, None)
        for tensor in tensors_in(gone.out) if gone is not None else ():
            self.once.sources.pop(place_of(tensor), None)


def _gone(once: weakref.ref[Once], place: int, _: Any) -> None:
    """The caller has let go of an argument."""
    there = once()
    source = None if there is None else there.sources.get(place)
    if there is not None and source is not None:
        there.drop(source)
