"""Soft routing: every branch mixes its fresh and its stored output, with a gradient to the weights.

HarmoniCa, arXiv 2410.01723, and its released code: out = r f + (1 - r) c; the slot keeps the
detached mixture where r > tau. The denoiser is frozen, the gradient goes to the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from ...caching import Slot, shape_of
from ...model import Override, map_tensors, override_, tensors_in
from ...runtime import QConv2d, QLayer
from ...sampling import Clock


class Mixer:
    """The soft decisions at the current step, shared by all branches.

    weights: r (N,), may require a gradient. apart: while True, branches compute as ever and
    neither read nor write what is stored: the teacher. tau: a slot is written where r > tau.
    store: "mixture" keeps r f + (1 - r) c, as the released code; "fresh" keeps f.
    credit: a mixture keeps its graph to the weights of the steps that made it (not to the
    denoiser's), so that a later step's loss reaches them; `forget` cuts it off.
    """

    def __init__(self, clock: Clock, tau: float, store: str) -> None:
        self.clock, self.tau, self.store = clock, tau, store
        self.apart = self.credit = False
        self.slots: list[Slot] = []
        self.weights = torch.ones(0)
        self.writes: list[bool] = []

    def set(self, weights: Tensor) -> None:
        """Take the weights (N,) of the step that comes."""
        self.weights = weights
        self.writes = (weights.detach() > self.tau).tolist()

    def forget(self) -> None:
        """Cut every slot off the weights of earlier steps."""
        for slot in self.slots:
            slot.detach_()


class Soft:
    """The forward of branch `column` under a mixer."""

    def __init__(self, mixer: Mixer, column: int) -> None:
        self.mixer, self.column, self.slot = mixer, column, Slot()
        mixer.slots.append(self.slot)

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mixer = self.mixer
        shape = shape_of(args, kwargs, len(mixer.clock.streams))
        out = original(*args, **kwargs)
        if mixer.apart:
            return out
        stored, fresh = self.slot.find(mixer.clock, shape), map_tensors(Tensor.detach, out)
        if stored is None:
            self.slot.store(mixer.clock, shape, fresh)
            return out
        r = mixer.weights[self.column]

        def blend(f: Tensor, c: Tensor) -> Tensor:
            return (r * f + (1 - r) * c).to(f.dtype)

        mixture = map_tensors(blend, out, stored)
        if mixer.writes[self.column]:
            kept = fresh
            if mixer.store == "mixture":
                kept = (
                    map_tensors(blend, fresh, stored)
                    if mixer.credit
                    else map_tensors(Tensor.detach, mixture)
                )
            self.slot.store(mixer.clock, shape, kept)
        return mixture


@contextmanager
def mixed(
    denoiser: nn.Module, branches: Sequence[str], clock: Clock, tau: float, store: str
) -> Iterator[Mixer]:
    """Soft routing in `denoiser`; quantized layers let gradients through. Taken out after."""
    mixer = Mixer(clock, tau, store)
    patches: list[Override] = []
    try:
        for column, name in enumerate(branches):
            patches.append(override_(denoiser.get_submodule(name), Soft(mixer, column)))
        for layer in denoiser.modules():
            if isinstance(layer, QLayer):
                patches.append(override_(layer, straight_through))
        yield mixer
    finally:
        while patches:
            patches.pop().remove()


def straight_through(original: Any, layer: Any, *args: Any, **named: Any) -> Tensor:
    """A quantized layer whose gradient is that of the layer with its dequantized weight."""
    x = next(tensors_in((args, named)))
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, layer, original)
    return original(*args, **named)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QLayer, original: Any) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return original(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, grad = ctx.layer.weight.to(grads[0].dtype), grads[0]
        if not isinstance(ctx.layer, QConv2d):
            return F.linear(grad, weight.t()), None, None
        geometry: Any = ctx.layer.geometry  # stride, padding, dilation, groups
        return conv2d_input(ctx.shape, weight, grad, *geometry), None, None
