"""`InPlaceWeights`: whether a model is still what a CUDA graph was made of, asked at every call.

A graph reads weights where they were and knows nothing of what Python would do. So the model is
walked once: every weight, every value that a module was given, every adapter. A call then only asks
whether each is still the same object at the same address, and where one is not, walks again.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Replacement
from ..sampling import Clock
from .adapters_in_place import AdaptersInPlace
from .graph_refusals import refusal_of

# What torch itself asks before it replays a graph, in builds for CUDA: a hundred times as fast.
_equal: Any = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
MEMBERS = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OWN = {*vars(nn.Module()), "_diffusers_hook"} - {"training", "_compiled_call_impl"}
OWN |= {"peft_config", "_hf_peft_config_loaded"}  # an adapter's layers have what counts of it
OURS = {"packings", "_original"}  # what counts of a replacement; the rest follows from its scheme
SIZES = {"in_features", "out_features", "in_channels", "out_channels", "kernel_size"}
SIZES |= {"normalized_shape", "num_channels", "num_embeddings", "embedding_dim"}
RANDOM = nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm
DEEP = 3  # how far objects and containers inside a module are looked into
RESTLESS = 40  # changes from call to call: then there is no use in graphs
MARKS = 64  # different states that are remembered


class InPlaceWeights:
    """The addresses of a model's weights, and what else decides how it computes.

    Those of adapters stay in place, see `AdaptersInPlace`. device: of these weights. strict: as
    `refusal_of` takes it.
    """

    def __init__(self, model: nn.Module, device: str = "cuda", strict: bool = False) -> None:
        self.model, self.device, self.strict = model, device, strict
        self.walks = 0  # how often the whole model was looked at
        self.refusal: str | None = None  # why it must run as it is
        self._seen: _Walk | None = None
        self._mark = self._streak = 0
        self._marks: dict[tuple[Any, ...], int] = {}
        self._numbers = count()
        self._adapters = AdaptersInPlace(device)
        self._opaque: dict[int, Any] = {}  # known by identity: no other may get it

    def latest(self) -> tuple[Any, ...] | None:
        """The state at the last call if every weight is where it was then; for the rest `same`.

        What a graph of it reads is in memory as long as this is not None.
        """
        seen = self._seen
        return self._now() if seen is not None and seen.in_place() else None

    def same(self, placed: bool = False) -> bool:
        """Whether the model is what it was at the last call: a tenth to one millisecond.

        placed: every weight is where it was, as `latest` has just said.
        """
        if self._seen is None or not self._seen.same() or not (placed or self._seen.in_place()):
            return False
        self._streak = 0
        return True

    def state(self) -> tuple[Any, ...]:
        """Equal for two calls that read the same weights in the same way; sets `refusal`."""
        if self.same():
            return self._now()
        self.walks, self._streak = self.walks + 1, self._streak + 1
        self._seen = None  # it has the weights of adapters that are gone
        self.refusal = refusal_of(self.model, self.strict)
        if self.refusal is None:
            self._adapters.keep(self.model)
        self._seen = _Walk(self.model)
        if len(self._marks) > MARKS:
            self._marks, self._opaque = {}, {}
        self._opaque |= self._seen.opaque
        facts = tuple(self._seen.facts)
        self._mark = self._marks[facts] if facts in self._marks else next(self._numbers)
        self._marks[facts] = self._mark
        return self._now()

    def _now(self) -> tuple[Any, ...]:
        clocks = () if self._seen is None else self._seen.clocks
        return self._mark, *(clock.exact for clock in clocks)

    @property
    def filling(self) -> bool:
        """Whether tables compute at this step what they keep, or what they have no row for."""
        return self._seen is not None and any(c.further.missing for c in self._seen.clocks)

    @property
    def restless(self) -> bool:
        """Whether something in the model changed before each of the last calls."""
        return self._streak > RESTLESS

    def forget(self) -> None:
        """Let go of what is remembered of the model; adapters stay where they are."""
        self._adapters.forget()
        self._seen, self._opaque, self._marks = None, {}, {}


class _Walk:
    """A model as it was found. facts: by value, equal for two models that compute alike.

    clocks: those of tables that compute, where their timesteps are not exact.
    """

    def __init__(self, model: nn.Module) -> None:
        self.facts: list[Any] = []
        self.opaque: dict[int, Any] = {}
        self.clocks: list[Clock] = []
        self._modules: list[Any] = []
        self._tensors: list[Tensor] = []
        self._dicts_whole: list[Any] = []  # of which all counts
        self._lists: list[Any] = []
        self._sized: list[Any] = []  # what may get further members
        self._dicts: list[Any] = []  # of which some keys count, and what was there
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._visited: dict[int, int] = {}
        self._module(model)
        self._visited.clear()
        self._classes = [*map(type, self._modules)]
        self._filled = [*filter(None, self._dicts_whole)]  # the sizes of all are watched
        self._items = [*self._inner()]
        self._sized += [*self._dicts_whole, *self._lists]
        self._sizes = [*map(len, self._sized)]
        self._packed = [m for m in self._modules if hasattr(m, "packings")]
        self._packings = self._packed_so_far()
        self._places = [x.data_ptr() for x in self._tensors]
        self._numbers = list(range(len(self._tensors)))

    def same(self) -> bool:
        """Whether every value is the object that it was; where weights are, `in_place` says."""
        found = map(dict.get, self._dicts, self._keys)
        return (
            [*map(len, self._sized)] == self._sizes
            and all(map(operator.is_, self._inner(), self._items))
            and all(map(operator.is_, found, self._values))
            and all(map(operator.is_, map(type, self._modules), self._classes))
        )

    def _inner(self) -> Iterator[Any]:
        """What is in the dicts and lists of which all counts."""
        return chain(
            chain.from_iterable(map(dict.values, self._filled)), chain.from_iterable(self._lists)
        )

    def in_place(self) -> bool:
        """Whether every weight is at its address, those too that layers have packed."""
        if self._packed_so_far() != self._packings:
            return False
        if _equal is not None:
            return _equal(self._tensors, self._places, self._numbers)
        return [*map(Tensor.data_ptr, self._tensors)] == self._places

    def _packed_so_far(self) -> int:
        return sum([module.packings for module in self._packed])

    def _module(self, module: nn.Module) -> None:
        if self._again(module):
            return
        own, kind = vars(module), type(module)
        self._modules.append(module)
        self.facts.append(kind)
        self._sized += [own, *(own[name] for name in HOOKS)]
        self._sized += [own["_diffusers_hook"].hooks] if "_diffusers_hook" in own else []
        layer = kind.__module__.startswith("torch.nn.") and not own["_modules"]
        for name in MEMBERS:
            if own[name] or not layer:
                self._mapping(own[name], 0)
        if isinstance(module, Replacement):
            self._clock(own)
            keys = own.keys() & OURS
        else:
            keys = own.keys() - OWN
        if layer:
            keys -= SIZES if isinstance(module, RANDOM) else SIZES | {"training"}
        for key in own:
            if key in keys:
                self._watch(own, key)

    def _watch(self, own: dict[str, Any], key: str) -> None:
        """One value of a dict of which others may change."""
        self._dicts.append(own)
        self._keys.append(key)
        self._values.append(own[key])
        self._named(key, own[key], 0)

    def _clock(self, own: dict[str, Any]) -> None:
        """Its index is read where it is; code may go by whether a timestep is exact."""
        clock = own.get("clock")
        if not isinstance(clock, Clock):
            return
        if own.get("_original") and all(clock is not known for known in self.clocks):
            self.clocks.append(clock)
        if not self._again(clock):
            self._watch(vars(clock), "index")
            self._watch(vars(clock.further), "row")

    def _again(self, value: Any) -> bool:
        """Whether it was seen before in this walk; that it was is noted."""
        known = self._visited.get(id(value))
        if known is None:
            self._visited[id(value)] = len(self._visited)
        else:
            self.facts.append(known)
        return known is not None

    def _mapping(self, whole: Any, deep: int) -> None:
        self._dicts_whole.append(whole)
        for key, value in whole.items():
            self._named(key, value, deep)

    def _named(self, key: Any, value: Any, deep: int) -> None:
        self.facts.append(key)
        self._value(value, deep)

    def _value(self, value: Any, deep: int) -> None:
        if isinstance(value, PLAIN):
            self.facts += (type(value), value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, tuple):
            self.facts.append((type(value), len(value)))
            for item in value:
                self._value(item, deep)
        elif deep >= DEEP or isinstance(value, type) or inspect.isroutine(value):
            self._identity(value)
        elif not self._again(value):
            self._inside(value, deep + 1)

    def _identity(self, value: Any) -> None:
        self.facts.append(id(value))
        self.opaque[id(value)] = value

    def _inside(self, value: Any, deep: int) -> None:
        """What a container or an object, an attention's processor say, contains."""
        kind, own = type(value), getattr(value, "__dict__", None)
        self.facts.append(kind)
        if isinstance(value, dict):
            self._mapping(value, deep)
        elif isinstance(value, list | set | frozenset):
            self._lists.append(value)
            for item in value:
                self._value(item, deep)
        elif not isinstance(own, dict) or _form(kind) != _form(_Simple):
            self._identity(value)  # it has slots, or is made in C: there is more than one sees
        if isinstance(own, dict):
            self._mapping(own, deep)

    def _tensor(self, value: Tensor) -> None:
        if hasattr(value, "__tensor_flatten__"):  # of a class that holds others, codes say
            self.facts.append(type(value))
            for name in value.__tensor_flatten__()[0]:  # type: ignore[operator]
                self._value(getattr(value, name), 0)
            return
        self.facts += (value.shape, value.stride(), value.dtype, value.data_ptr())
        self._tensors.append(value)


class _Simple:
    """An object whose `__dict__` is all of it."""


def _form(kind: type) -> tuple[int, int]:
    return kind.__basicsize__, kind.__weakrefoffset__
