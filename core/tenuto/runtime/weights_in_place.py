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
from ..model.adapters import BASE
from .graph_refusals import refusal_of

# What torch itself asks before it replays a graph, in builds for CUDA: a hundred times as fast.
_equal: Any = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
HELD = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OWN = {*vars(nn.Module()), "_compiled_call_impl", "_diffusers_hook"} - {"training"}
OWN |= {"peft_config", "_hf_peft_config_loaded"}  # an adapter's layers have what counts of it
RANDOM = nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm
DEEP = 3  # how far objects and containers inside a module are looked into
RESTLESS = 40  # changes from call to call: then there is no use in graphs
MARKS = 64  # different states that are remembered
FORMS = 2  # of one adapter's weight that are kept in place: a rank, and the one before it


class InPlaceWeights:
    """The addresses of a model's weights, and what else decides how it computes.

    A weight of an adapter (a LoRA's factor) gets memory of its own the first time that it is seen;
    one that comes later for the same layer, under the same name and in the same shape, is copied
    into that memory. So the graph of the first is that of the second. device: of these weights.
    """

    def __init__(self, model: nn.Module, device: str = "cuda") -> None:
        self.model, self.device = model, device
        self.walks = 0  # how often the whole model was looked at
        self.refusal: str | None = None  # why it must run as it is
        self._seen: _Walk | None = None
        self._mark = self._streak = 0
        self._marks: dict[tuple[Any, ...], int] = {}
        self._numbers = count()
        self._adapters: dict[str, dict[Any, Tensor]] = {}
        self._opaque: dict[int, Any] = {}  # known by identity: no other may get it

    def latest(self) -> int | None:
        """The state at the last call if every weight is where it was then; for the rest `same`.

        What a graph of it reads is in memory as long as this is not None.
        """
        seen = self._seen
        return self._mark if seen is not None and seen.in_place() else None

    def same(self) -> bool:
        """Whether the model is what it was at the last call: a tenth to one millisecond."""
        return self._seen is not None and self._seen.same()

    def state(self) -> int:
        """Equal for two calls that read the same weights in the same way; sets `refusal`."""
        if self.same():
            self._streak = 0
            return self._mark
        self.walks, self._streak = self.walks + 1, self._streak + 1
        self.refusal = refusal_of(self.model)
        if self.refusal is None:
            self._keep_adapters_in_place()
        self._seen = _Walk(self.model)
        self._opaque |= self._seen.opaque
        if len(self._marks) > MARKS:
            self._marks.clear()
        facts = tuple(self._seen.facts)
        self._mark = self._marks[facts] if facts in self._marks else next(self._numbers)
        self._marks[facts] = self._mark
        return self._mark

    @property
    def restless(self) -> bool:
        """Whether something in the model changed before each of the last calls."""
        return self._streak > RESTLESS

    def forget(self) -> None:
        """Let go of what is remembered of the model; adapters stay where they are."""
        self._seen, self._adapters, self._opaque, self._marks = None, {}, {}, {}

    @torch.no_grad()
    def _keep_adapters_in_place(self) -> None:
        with torch.inference_mode(False):
            for name, tensor in _adapters_weights(self.model):
                alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
                if tensor.device.type == self.device and alone and not tensor.is_inference():
                    self._kept(self._adapters.setdefault(name, {}), tensor)

    def _kept(self, forms: dict[Any, Tensor], tensor: Tensor) -> None:
        """The values of a weight in the memory that is kept for them."""
        form = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        known = forms.pop(form, None)
        if known is None:
            known = tensor.detach().clone()
        elif known.data_ptr() != tensor.data_ptr():
            known.copy_(tensor.detach())
        forms[form] = known
        if len(forms) > FORMS:
            del forms[next(iter(forms))]
        if known.data_ptr() != tensor.data_ptr():
            tensor.data = known


def _adapters_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What adapters have learnt, by name; without the layers inside them."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(getattr(module, BASE, None), nn.Module):
            for key, child in module.named_children():
                for inner, weight in child.named_parameters() if key != BASE else ():
                    if id(weight) not in seen:
                        seen.add(id(weight))
                        yield f"{name}.{key}.{inner}", weight


class _Walk:
    """A model as it was found. facts: by value, equal for two models that compute alike."""

    def __init__(self, model: nn.Module) -> None:
        self.facts: list[Any] = []
        self.opaque: dict[int, Any] = {}
        self._modules: list[Any] = []
        self._tensors: list[Tensor] = []
        self._held: list[Any] = []  # dicts of which all counts
        self._lists: list[Any] = []
        self._sized: list[Any] = []  # what may get further members
        self._dicts: list[Any] = []  # of which some keys count, and what was there
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._visited: dict[int, int] = {}
        self._module(model)
        self._visited.clear()
        self._classes = [*map(type, self._modules)]
        self._items = self._inner()
        self._size = sum(map(len, self._sized))
        self._packed = [m for m in self._modules if hasattr(m, "packings")]
        self._packings = self._packed_so_far()
        self._places = [x.data_ptr() for x in self._tensors]
        self._numbers = list(range(len(self._tensors)))

    def same(self) -> bool:
        """Whether every value is the object that it was, and every weight where it was."""
        items, found = self._inner(), map(dict.get, self._dicts, self._keys)
        return (
            len(items) == len(self._items)
            and all(map(operator.is_, items, self._items))
            and all(map(operator.is_, found, self._values))
            and sum(map(len, self._sized)) == self._size
            and all(map(operator.is_, map(type, self._modules), self._classes))
            and self.in_place()
        )

    def _inner(self) -> list[Any]:
        inside = chain.from_iterable(map(dict.values, self._held))
        return [*inside, *chain.from_iterable(self._lists)]

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
        for name in HELD:
            if own[name] or not layer:
                self._mapping(own[name], 0)
        keys = own.keys() - OWN
        if isinstance(module, Replacement):
            keys &= {"packings"}  # the rest of it is ours
        elif layer:  # nobody gives it another width
            keys &= {"forward", "training"} if isinstance(module, RANDOM) else {"forward"}
        for key in own:
            if key in keys:
                self._dicts.append(own)
                self._keys.append(key)
                self._values.append(own[key])
                self._named(key, own[key], 0)

    def _again(self, value: Any) -> bool:
        """Whether it was seen before in this walk; that it was is noted."""
        known = self._visited.get(id(value))
        if known is None:
            self._visited[id(value)] = len(self._visited)
        else:
            self.facts.append(known)
        return known is not None

    def _mapping(self, held: Any, deep: int) -> None:
        self._held.append(held)
        for key, value in held.items():
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
            self.facts.append(id(value))
            self.opaque[id(value)] = value
        elif not self._again(value):
            self._inside(value, deep + 1)

    def _inside(self, value: Any, deep: int) -> None:
        """What a container or an object, an attention's processor say, holds."""
        self.facts.append(type(value))
        if isinstance(value, dict):
            self._mapping(value, deep)
        elif isinstance(value, list | set | frozenset):
            self._lists.append(value)
            for item in value:
                self._value(item, deep)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._mapping(vars(value), deep)

    def _tensor(self, value: Tensor) -> None:
        if hasattr(value, "__tensor_flatten__"):  # of a class that holds others, codes say
            self.facts.append(type(value))
            for name in value.__tensor_flatten__()[0]:  # type: ignore[operator]
                self._value(getattr(value, name), 0)
            return
        self.facts += (value.shape, value.stride(), value.dtype, value.data_ptr())
        self._tensors.append(value)
