"""`AdaptersInPlace`: adapters loaded one after another in the memory that CUDA graphs read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model.adapters import BASE

FORMS = 2  # of one weight that are kept: a rank, and the one before it
_owners: Any = getattr(torch._C, "_storage_Use_Count", None)


class AdaptersInPlace:
    """Memory for what adapters have learnt (the factors of a LoRA).

    A weight gets memory of its own the first time that it is seen; one that comes later for the
    same layer, under the same name and in the same shape, is copied into that memory, unless
    somebody still has the weight before it. So the graph of the first is that of the second.
    device: of these weights.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.memory: dict[str, dict[Any, Tensor]] = {}  # by name and form

    @torch.no_grad()
    def keep(self, model: nn.Module) -> None:
        """Give the weights of the adapters of `model` their memory.

        What is not there any more goes when others are; without any, the last ones stay.
        """
        found = dict(_adapters_weights(model))
        with torch.inference_mode(False):
            for name, tensor in found.items():
                alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
                if tensor.device.type == self.device and alone and not tensor.is_inference():
                    _kept(self.memory.setdefault(name, {}), tensor)
        if found:
            self.memory = {name: forms for name, forms in self.memory.items() if name in found}

    def forget(self) -> None:
        """Copy into none of them any more: whoever has one keeps it."""
        self.memory = {}


def _kept(forms: dict[Any, Tensor], tensor: nn.Parameter) -> None:
    """The values of a weight in the memory that there is for them."""
    form = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    known = forms.pop(form, None)
    there = known is not None and known.data_ptr() == tensor.data_ptr()
    if known is None or not (there or _unused(known)):
        known = tensor.detach().clone()
    elif not there:
        known.copy_(tensor.detach())
    forms[form] = known
    if len(forms) > FORMS:
        del forms[next(iter(forms))]
    if known.data_ptr() != tensor.data_ptr():
        tensor.data = known


def _unused(memory: Tensor) -> bool:
    """Whether no other tensor lies in the same memory: of a state dict that somebody keeps, say."""
    if _owners is None:
        return False
    new = torch.empty(0)  # of which nobody else knows
    owners = [_owners(x.untyped_storage()._cdata) for x in (memory, new)]
    return owners[0] == owners[1]


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
