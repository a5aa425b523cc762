"""Put patches into a model and take them out again.

Nothing here changes a class: a forward is replaced on one instance, a leaf in its parent, and the
old one comes back bit for bit.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import ModelError
from .adapters import holder_of

Self = TypeVar("Self", bound="Attached")  # typing has one from 3.11 on


class Override:
    """A replaced forward on one instance; a deep copy of the module keeps it and its own state.

    call(original, module, *args, **kwargs) computes the new output. What is put in is a method of
    it: a compiler takes two blocks with methods of one function for alike, two objects it does not.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module, self.call = module, call
        self.own = type(module).forward  # found here: a compiler cannot ask a class
        self.before, self.off = _live(module.__dict__.get("forward")), False

    def put(self) -> None:
        """Make it the forward of its module."""
        self.module.__dict__["forward"] = types.MethodType(Override.__call__, self)

    def lies_on_top(self) -> bool:
        """Whether the module's forward is this one."""
        return patch_of(self.module.__dict__.get("forward")) is self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        return self.call(self.original, self.module, *args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the module did before."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return self.own(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Take the replacement out."""
        if not self.lies_on_top():
            raise ModelError("Another patch was put on top of this one: remove that first.")
        self.before = _live(self.before)
        if self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before

    def retire(self) -> None:
        """Take it out, or, under another patch, do nothing from now on: hosts keep no order.

        What is put on or taken out later finds it and lets go of it.
        """
        self.off = True
        if self.lies_on_top():
            self.remove()


def _live(forward: Any) -> Any:
    """What `forward` leads to: retired overrides are left out."""
    patch = patch_of(forward)
    while patch is not None and patch.off:
        forward = patch.before
        patch = patch_of(forward)
    return forward


def patch_of(forward: Any) -> Override | None:
    """The patch that a forward is of, if it is one of ours."""
    own = forward.__self__ if type(forward) is types.MethodType else None
    return own if isinstance(own, Override) else None


def override_(module: nn.Module, call: Callable[..., Any]) -> Override:
    """Replace the forward of `module` by `call(original, module, *args, **kwargs)`."""
    patch = Override(module, call)
    patch.put()
    return patch


class Swap:
    """A module replaced where it is; the old one follows a move or a cast meanwhile.

    Beneath adapters: one that is put round the new module, or taken off it, changes nothing.
    parked: whether the weights of the old module are out of the way for now, see `Parked`.
    """

    parked = False

    def __init__(self, root: nn.Module, name: str, new: nn.Module) -> None:
        self.root, self.name = root, name
        holder, key = holder_of(root, name)
        self.old: nn.Module | None = getattr(holder, key)
        self.new, self.place = new, _place_of(new)
        for module in new.modules():  # no state of the model: offloading looks for all that is
            held = (name for name, value in module._buffers.items() if value is not None)
            module._non_persistent_buffers_set.update(held)
        new.__dict__["_swap"] = weakref.ref(self)
        setattr(holder, key, new)

    def remove(self) -> None:
        """Put the old module back."""
        holder, key = holder_of(self.root, self.name)
        setattr(holder, key, self.original())

    def original(self) -> nn.Module:
        """The old module, moved and cast as the new one was; ModelError if it was released."""
        if self.old is None:
            raise ModelError("The originals were released: load the model again.")
        device, dtype = _place_of(self.new)
        if self.parked:  # its values will do; they are moved when they come back
            same = dtype is None or dtype.itemsize < 2 or dtype is self.place[1]
            return self.old if same else self.old.to(dtype)
        cast = dtype is not None and dtype.itemsize < 2  # layerwise, of the new and of what it
        if cast:  # shares with the old
            dtype = self.place[1]
        if (cast or (device, dtype) != self.place) and device is not None and device.type != "meta":
            self.old.to(device, dtype)
            self.place = device, dtype
        return self.old

    def device(self) -> torch.device | None:
        """Where the new module is by now."""
        return _place_of(self.new)[0]

    def release(self) -> None:
        """Forget the old module, and whatever the new one keeps of it."""
        self.old = None
        forget = getattr(self.new, "release", None)
        if forget is not None:
            forget()


class Replacement(nn.Module):
    """A module that a `Swap` puts in place of another: what is saved of it is the other's state.

    `save_pretrained` and `state_dict` of an attached model give the float weights by their own
    names; where those were released they raise ModelError instead of writing half a model.
    """

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's, where this module stands in its place."""
        original = self._replaced()
        if original is None:
            return super().state_dict(*args, **kwargs)
        return original.state_dict(*args, **kwargs)

    def _replaced(self) -> nn.Module | None:
        if "_swap" not in self.__dict__:
            return None
        swap = self.__dict__["_swap"]()
        if swap is None or swap.old is None:
            raise ModelError(
                "The float weights of the attached model were released, and quantized ones cannot "
                "be saved with it: load the model again to save it; an artifact saves itself."
            )
        return swap.original()


def _place_of(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Where a replacement computes, and the dtype that it stands for, if it says so."""
    tensor = next((t for t in (*module.buffers(), *module.parameters())), None)
    return None if tensor is None else tensor.device, getattr(module, "dtype", None)


class Attached:
    """Patches in a model. `handle` is the patched model; `detach()` restores it bit for bit."""

    def __init__(self, handle: Any, patches: Sequence[Any]) -> None:
        self.handle = handle
        self.patches = list(patches)

    def detach(self) -> None:
        """Take every patch out, last first; twice does no harm."""
        while self.patches:
            self.patches[-1].remove()
            self.patches.pop()

    def swaps(self) -> list[Swap]:
        """What is replaced."""
        return [patch for patch in self.patches if isinstance(patch, Swap)]

    def release(self) -> None:
        """Forget the replaced modules: their memory is free, and there is no way back."""
        for swap in self.swaps():
            swap.release()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()
