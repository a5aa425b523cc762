"""Policies that decide at run time: what is seen of a call says whether the rest is computed.

Such a policy has no table. It is a dataclass with a `name` and
`gate()`, a new `Gate` for one run of one set of streams;
`computes`: how many blocks of a chain are computed before it is asked: 0 or 1; None asks it about
the whole call;
`residual`: of whole calls, whether what is kept is the output less the sample.

A chain is a list of blocks that one hidden state runs through. What the skipped blocks added to it
the last time is added again, and the head computes. Of other models (U-Nets) the whole output is
kept, and after a first block the call is broken off. A batch is one decision, of means over it.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..model import Override, Signature, describe, map_tensors, override_, tensors_in
from ..sampling import Clock
from .cells import CallShape


class Gate(Protocol):
    """The decisions of one run, for one set of streams."""

    def skips(self, seen: Tensor, step: int, steps: int) -> bool:
        """Asked once a call, where something is kept. seen: the sample, or what the first block
        added; step: of `steps` in the run."""
        ...

    def computed(self, seen: Tensor, kept: Tensor) -> None:
        """Told after every call that computed: what is kept of it."""
        ...


class RunTimePolicy(Protocol):
    """See above."""

    computes: ClassVar[int | None]

    @property
    def residual(self) -> bool:
        """Whether outputs are kept less the sample."""
        ...

    def gate(self) -> Gate:
        """A new one."""
        ...


@dataclass
class State:
    """Of one set of streams in the run in progress."""

    gate: Gate
    shape: Any
    kept: Any = None
    seen: Tensor | None = None
    entered: Tensor | None = None  # the hidden state where skipping begins
    skips: bool = False


class RunTimeCalls:
    """The forward of a denoiser under such a policy; `counts` are calls [computed, skipped]."""

    def __init__(self, clock: Clock, policy: RunTimePolicy, denoiser: nn.Module) -> None:
        self.clock, self.policy = clock, policy
        self.facts, self.shape = Signature(denoiser), CallShape(denoiser)
        self.chain = chain_of(denoiser) if policy.computes is not None else ()
        self.counts = [0, 0]
        self.run: int | None = None
        self.states: dict[tuple[Hashable, ...], State] = {}
        self.now: State | None = None  # of the call in progress

    def __deepcopy__(self, memo: dict[int, Any]) -> RunTimeCalls:
        made = copy.copy(self)
        memo[id(self)] = made
        made.clock, made.counts = copy.deepcopy(self.clock, memo), list(self.counts)
        made.run, made.states, made.now = None, {}, None
        return made

    def overrides(self, denoiser: nn.Module) -> list[Override]:
        """Put it on the denoiser and on the blocks that it looks at or skips."""
        blocks = self.chain
        if not blocks and self.policy.computes:
            blocks = describe(denoiser).blocks[:1]
        found = [override_(denoiser, self)]
        for place, name in enumerate(blocks):
            call = BlockCall(self, place, place == len(blocks) - 1)
            found.append(override_(denoiser.get_submodule(name), call))
        return found

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        sample = first_of(self.facts.sample(self.facts.inputs(args, kwargs)))
        state = self.now = self._state(self.shape(args, kwargs))
        state.skips = False
        try:
            if not self.chain and not self.policy.computes:
                self.look(state, sample)
            if state.skips and not self.chain:
                raise Skipped
            out = original(*args, **kwargs)
        except Skipped:
            self.counts[1] += 1
            return moved(state.kept, sample if self.policy.residual else None, 1)
        finally:
            self.now = None
        self.counts[1 if state.skips else 0] += 1
        if not self.chain:
            state.kept = moved(out, sample if self.policy.residual else None, -1)
            self.keep(state, first_of(state.kept))
        return out

    def look(self, state: State, seen: Tensor) -> None:
        """Ask the gate about a call."""
        place, steps = self.clock.step, len(self.clock.timesteps)
        if self.clock.grid:
            place, steps = self.clock.place, len(self.clock.grid)
        asked = state.kept is not None and place > 0
        state.seen, state.skips = seen, asked and state.gate.skips(seen, place, steps)

    def keep(self, state: State, kept: Tensor) -> None:
        """Tell the gate of a computed call."""
        if state.seen is not None:
            state.gate.computed(state.seen, kept)

    def _state(self, shape: Any) -> State:
        if self.run != self.clock.run:
            self.run, self.states = self.clock.run, {}
        state = self.states.get(self.clock.streams)
        if state is None or state.shape != shape:
            state = self.states[self.clock.streams] = State(self.policy.gate(), shape)
        return state


class BlockCall:
    """The forward of a block of a chain, or of the first block of another model."""

    def __init__(self, owner: RunTimeCalls, place: int, last: bool) -> None:
        self.owner, self.place, self.last = owner, place, last

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        owner, state, start = self.owner, self.owner.now, self.owner.policy.computes
        if state is None:
            return original(*args, **kwargs)
        hidden = first_of((args, kwargs))
        if self.place == start == 0:
            owner.look(state, hidden)
        if self.place == start:
            state.entered = hidden
        if state.skips:
            return hidden + state.kept if self.place == start else hidden.clone()
        out = original(*args, **kwargs)
        if self.place == 0 and start == 1:
            new = first_of(out)
            owner.look(state, new - hidden if new.shape == hidden.shape else new)
            if state.skips and not owner.chain:
                raise Skipped
        if self.last and owner.chain and state.entered is not None:
            state.kept = first_of(out) - state.entered
            owner.keep(state, state.kept)
        return out


class Skipped(Exception):
    """Ends a denoiser's call after its first block; `RunTimeCalls` catches it."""


def chain_of(denoiser: nn.Module) -> tuple[str, ...]:
    """The blocks, where they are the members of one list, three or more; else none.

    One hidden state, their first argument, then runs through all of them.
    """
    blocks = describe(denoiser).blocks
    lists = {name.rpartition(".")[0] for name in blocks}
    return blocks if len(blocks) > 2 and len(lists) == 1 else ()


def first_of(value: Any) -> Tensor:
    """The first tensor in a container, detached."""
    return next(tensors_in(value)).detach()


def relative(a: Tensor, b: Tensor) -> float:
    """How far `a` is from `b`: mean |a - b| over mean |b|. One read of the device."""
    return float((a - b).abs().mean() / b.abs().mean().clamp_min(1e-12))


def moved(out: Any, sample: Tensor | None, sign: int) -> Any:
    """A copy of `out` plus `sign` times the sample, (B, C, ...), in the channels that both have."""

    def one(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if sample is not None and x.ndim > 1 and (len(x), x.shape[2:]) == (
            len(sample), sample.shape[2:],
        ):  # fmt: skip
            channels = min(x.shape[1], sample.shape[1])
            x[:, :channels] += sign * sample[:, :channels].to(x.dtype)
        return x

    return map_tensors(one, out)
