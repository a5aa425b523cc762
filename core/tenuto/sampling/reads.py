"""What a pipeline reads of a text encoder's output: hidden states, by number, and other entries.

The output that a pipeline gets notes what is asked of it; nothing in it changes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model import device_and_dtype
from .record import to_device
from .trajectory import Call

STATES = "hidden_states"
Read = tuple[int | str, ...]
States = list[list[Tensor]]  # by row of a call and state: (T, D)


class Reads:
    """What was read of the outputs of one encoder, see `found`."""

    def __init__(self) -> None:
        self.states: set[int] = set()
        self.entries: set[str] = set()
        self.first: set[str] = set()  # the first entry, if a sequence: some only look at its form
        self.count = 0  # of the states, where all of them were asked for at once

    def watch(self, out: Any) -> None:
        """Note what is asked of `out`, if it is an output of transformers."""
        if isinstance(out, Mapping) and dataclasses.is_dataclass(out):
            vars(out)["_reads"] = self
            out.__class__ = _noting(type(out))  # type: ignore[assignment]

    def found(self) -> Read:
        """Numbers of hidden states, from 0, then names of other entries; (): the first entry."""
        states = self.states or set(range(self.count))
        return (*sorted(states), *sorted(self.entries if states else self.entries | self.first))

    def entry(self, name: str, value: Any, by_place: bool = False) -> Any:
        """`value`, which was asked for; states come as a tuple that notes which of them are."""
        if name == STATES and isinstance(value, tuple):
            self.count = len(value)
            states = _States(value)
            states.read = self.states
            return states
        if isinstance(value, Tensor) and value.is_floating_point():
            (self.first if by_place and value.ndim > 2 else self.entries).add(name)
        return value


class _States(tuple[Tensor, ...]):
    """Hidden states; what is done with them as a whole reads all of them."""

    read: set[int]

    def __getitem__(self, place: Any) -> Any:
        which = range(len(self))[place]
        self.read.update([which] if isinstance(which, int) else which)
        return super().__getitem__(place)

    def __iter__(self) -> Iterator[Tensor]:
        self.read.update(range(len(self)))
        return super().__iter__()


@functools.cache
def _noting(kind: type[Any]) -> type[Any]:
    """An output class that tells `_reads` of each entry that is asked for."""

    def get(self: Any, place: Any) -> Any:
        if isinstance(place, slice):
            return tuple(self[name] for name in [*self.keys()][place])
        name = [*self.keys()][place] if isinstance(place, int) else place
        return vars(self)["_reads"].entry(name, dict.__getitem__(self, name), place == 0)

    own: Any = kind.__getattribute__

    def attribute(self: Any, name: str) -> Any:
        value = own(self, name)
        if name.startswith("_") or not dict.__contains__(self, name):
            return value
        return vars(self)["_reads"].entry(name, value)

    return type(kind.__name__, (kind,), {"__getitem__": get, "__getattribute__": attribute})


@torch.no_grad()
def state_count(encoder: nn.Module, call: Call) -> int:
    """How many hidden states an encoder gives out when it is called like this."""
    return len(getattr(_answer(encoder, call), STATES, None) or ())


def _answer(encoder: nn.Module, call: Call) -> Any:
    device, dtype = device_and_dtype(encoder)
    return encoder(**to_device(call.inputs, device, dtype))


@torch.no_grad()
def states_read(encoder: nn.Module, call: Call) -> list[list[Tensor]]:
    """What the pipeline reads of each row of a call: by row and state, (T, D) in fp32 on the CPU.

    T are the tokens that count; a state that is one vector for the whole text has one.
    """
    out = _answer(encoder, call)
    several = getattr(out, STATES, None) or ()
    wanted = [several[k] if isinstance(k, int) else out[k] for k in call.read] or [out[0]]
    counted = call.counted
    return [
        [_tokens(state[i], None if counted is None else counted[i]) for state in wanted]
        for i in range(len(wanted[0]))
    ]


def _tokens(state: Tensor, counted: Tensor | None) -> Tensor:
    """Those of a state (L, D), or the vector (D,), as (T, D)."""
    rows = state.detach().float().cpu()
    rows = rows if rows.ndim > 1 else rows[None]
    return rows if counted is None or len(counted) != len(rows) else rows[counted > 0]


def states_apart(full: States, low: States) -> list[dict[str, float]]:
    """How far each state is from full precision over all tokens, the mean, the worst, and as L2.

    full, low: by row and state, as `states_read` gives them of calls.
    """
    found = []
    for a, b in zip(zip(*full, strict=True), zip(*low, strict=True), strict=True):
        wanted, given = torch.cat(a).double(), torch.cat(b).double()
        cosine = nn.functional.cosine_similarity(wanted, given)
        gap = float((given - wanted).norm() / wanted.norm().clamp_min(1e-12))
        found.append({
            "cosine": float(f"{float(cosine.mean()):.6g}"), "least": float(f"{cosine.min():.6g}"),
            "relative_l2": float(f"{gap:.4g}"),
        })  # fmt: skip
    return found


def cosines(full: Sequence[Sequence[Tensor]], low: Sequence[Sequence[Tensor]]) -> list[float]:
    """The cosine of every token in every state with what it is in full precision."""
    pairs = ((a, b) for rows in zip(full, low, strict=True) for a, b in zip(*rows, strict=True))
    found = [nn.functional.cosine_similarity(a.double(), b.double()) for a, b in pairs]
    return torch.cat(found).tolist()
