"""A private fp32 copy of a denoiser, of which one block at a time has its weights.

What lies outside of the blocks is there all the time. A block gets its weights when it is called
and gives them up afterwards; `held` keeps them for a while:

    model = by_block(denoiser, backbone.blocks, device, codes)
    with held(model.get_submodule(name)) as block:
        ...

They come from the denoiser, wherever it has them (`Weights`), and of a layer that has codes from
those: quantized blocks are as the quantized model has them. So a model larger than memory can be
calibrated, and any other is in memory once and not several times.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model import Weights, describe, private_copy
from ..numerics import QTensor

FILL = "_fill"  # where a block has what fills it


def by_block(
    denoiser: nn.Module,
    blocks: Sequence[str],
    device: Any,
    codes: Mapping[str, QTensor] | None = None,
) -> nn.Module:
    """The copy on `device`, in eval mode and without gradients of its weights.

    codes: layer -> its quantized weight; looked at whenever a block is filled.
    """
    values = Values(denoiser, device, {} if codes is None else codes)  # codes may be empty yet
    model = private_copy(denoiser, empty=blocks).eval().requires_grad_(False)
    inside = {id(m) for name in blocks for m in model.get_submodule(name).modules()}
    for name, module in model.named_modules():
        for key in dict(module.named_buffers(recurse=False)):
            module._buffers[key] = values.of(_joined(name, key))
        for key, parameter in module.named_parameters(recurse=False):
            if id(module) not in inside or not parameter.is_meta:
                module._parameters[key] = _fixed(values.of(_joined(name, key)))
            else:
                parameter.data = parameter.data.to(_wide(parameter))
    for name in blocks:
        Fill(name, model.get_submodule(name), values)
    return model


def held(block: nn.Module) -> AbstractContextManager[nn.Module]:
    """`block` with its weights, which are copies: they may be changed, and are then forgotten."""
    fill = vars(block).get(FILL)
    return nullcontext(block) if fill is None else fill.held()


@contextmanager
def unfilled(block: nn.Module) -> Iterator[None]:
    """Within, a call of `block` does not give it its weights: something else computes for it."""
    fill = vars(block).get(FILL)
    before = fill is not None and fill.idle
    if fill is not None:
        fill.idle = True
    try:
        yield
    finally:
        if fill is not None:
            fill.idle = before


def filled(model: nn.Module, name: str) -> nn.Module:
    """The submodule `name`; where it lies inside of a block, a copy that has its weights."""
    parts = name.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    for block in (model.get_submodule(part) for part in above):
        if FILL in vars(block):
            with held(block):
                return copy.deepcopy(model.get_submodule(name))
    return model.get_submodule(name)


@torch.no_grad()
def with_codes(encoder: nn.Module, device: Any, codes: Mapping[str, QTensor]) -> nn.Module:
    """A copy in fp32 with the weights that `codes` stand for, a block at a time in memory."""
    twin = by_block(encoder, describe(encoder).blocks, device, codes)
    places = dict(encoder.named_parameters(remove_duplicate=False))
    for name, q in codes.items():
        weight = places[f"{name}.weight"]
        for place in (n for n, p in places.items() if p is weight):  # a table has several
            own = twin.get_parameter(place)
            if not own.is_meta:  # outside of the blocks
                own.copy_(q.dequantize())
    return twin


class Values:
    """The tensors of a denoiser by name: on a device, floating ones in fp32, quantized if they are.

    Each is a copy of its own.
    """

    def __init__(self, denoiser: nn.Module, device: Any, codes: Mapping[str, QTensor]) -> None:
        self.device, self.codes = device, codes
        self._weights = Weights(denoiser)
        self._tensors = dict(denoiser.named_parameters(remove_duplicate=False))
        self._tensors |= dict(denoiser.named_buffers(remove_duplicate=False))

    def of(self, name: str) -> Tensor:
        """The full-precision tensor."""
        tensor = self._tensors[name]
        return self._weights(tensor).to(self.device, _wide(tensor), copy=True)

    def now(self, name: str) -> Tensor:
        """The tensor as the quantized model has it."""
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self.codes:
            return self.of(name)
        return self.codes[layer].to(self.device).dequantize()


class Fill:
    """Hooks that give a block its weights for a call. A copy of the block is left as it is.

    What calls a part of the block and not the block itself finds the weights of that part.
    """

    def __init__(self, name: str, block: nn.Module, values: Values) -> None:
        self.values, self.block = values, block
        self.full, self.kept, self.idle = False, False, False
        self.places: dict[int, list[Place]] = {}
        for inner, module in block.named_modules():
            own = dict(module.named_parameters(recurse=False))
            found = [
                Place(module, key, parameter, _joined(name, inner, key))
                for key, parameter in own.items()
                if parameter.is_meta
            ]
            if found or module is block:
                self.places[id(module)] = found
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after, always_call=True)
        vars(block)[FILL] = self

    @contextmanager
    def held(self) -> Iterator[nn.Module]:
        """See the function of this name."""
        outermost, self.kept = not self.kept, True
        try:
            self._before(self.block, ())
            yield self.block
        finally:
            if outermost:
                self.kept = False
                self._after(self.block, (), None)

    def _before(self, module: nn.Module, args: Any) -> None:
        if self.idle and module is self.block:
            return
        for place in () if self.full else self._of(module):
            place.module._parameters[place.key] = _fixed(self.values.now(place.name))
        self.full = self.full or module is self.block

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        idle = self.idle and module is self.block
        if self.kept or idle or (self.full and module is not self.block):
            return
        for place in self._of(module):
            place.module._parameters[place.key] = place.empty
        self.full = False

    def _of(self, module: nn.Module) -> list[Place]:
        if module is self.block:
            return [place for places in self.places.values() for place in places]
        return self.places.get(id(module), [])

    def __deepcopy__(self, memo: dict[int, Any]) -> Fill:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(values=None, block=None, full=False, kept=False, idle=False, places={})
        return twin


class Place(NamedTuple):
    """Where a weight goes, what is there without it, and its name."""

    module: nn.Module
    key: str
    empty: nn.Parameter
    name: str


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
