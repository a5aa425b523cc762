"""Quantized layers in the host's model: an artifact's, or rounded to nearest where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.model import Override, override_
from tenuto.runtime import (
    InFloat,
    QLayer,
    Replacements,
    TemporalTable,
    executions,
    follow_input,
)

from . import hosts
from .lora import Changes
from .run import Run

SIDE, AGAIN, WHOLE = "side branch", "requantise", "off"  # what becomes of a LoRA


class Weights:
    """Layers that compute with codes. They outlive a run: a checkpoint is quantized once.

    chosen: what they were made by, kept as long as they are. Its `lora`, WHOLE, leaves a layer that
    a LoRA changes in full precision.
    """

    def __init__(self, plan: Replacements, chosen: Any) -> None:
        self.plan, self.chosen, self.lora = plan, chosen, chosen.lora
        self.kept: dict[str, tuple[Any, QLayer]] = {}
        self.floats: dict[str, InFloat] = {}  # what the host's own layers compute in place of them
        self.rounded = False  # whether layers were made in this run
        self.run, self.changes = Run(), Changes(None)

    def overrides(self, denoiser: nn.Module, run: Run, changes: Changes) -> list[Override]:
        """Put the patches in for one run: tables, then layers."""
        self.run, self.changes = run, changes
        run.clocks.append(self.plan.clock)
        found = []
        for name in self.plan.tables:
            module = denoiser.get_submodule(name)
            table = Table(self, name, module, self.plan.table(name, module))
            found.append(override_(module, table))
        for name, layer in hosts.layers(denoiser):
            if name in self.plan.schemes:
                found.append(override_(layer, Quantized(self, name, layer.weight.shape[1])))
        return found

    def layer(self, name: str, module: Any, device: torch.device) -> QLayer:
        """The quantized layer in place of `module`, made when it is first called."""
        again = self.lora == AGAIN and self.changes.difference(name, module) is not None
        token = hosts.version_of(module.weight) if again else None
        known = self.kept.get(name)
        if known is None or known[0] != token:
            self.rounded = True
            with torch.inference_mode(False), torch.no_grad():
                layer = self.plan.layer(name, module, self._rounded(name, module, again))
            known = self.kept[name] = token, layer.to(device)
        follow_input(known[1], self.changes.effective(module, "bias"), device)
        return known[1]

    def _rounded(self, name: str, module: Any, again: bool) -> Tensor | None:
        """The weight that is to be rounded; None where the artifact has its codes."""
        if again:
            return self.changes.effective(module).detach()
        return None if self.plan.codes else self.changes.own(name, module).detach().clone()

    def how(self) -> dict[str, int]:
        """How the layers that were called compute: {"int8": count, ...}."""
        layers = {name: layer for name, (_, layer) in self.kept.items()}
        return dict(Counter(executions(layers, self.floats).values()))

    def ended(self) -> None:
        """A run is over: what rounding and timing took, if anything, is the card's again."""
        if self.rounded and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self.rounded = False


class Quantized:
    """The forward of one layer: from codes and the LoRA's side branch, or the layer's own.

    width: of its input. Where "auto" decides for float, it is the layer's own, LoRAs and all.
    """

    def __init__(self, owner: Weights, name: str, width: int) -> None:
        self.owner, self.name = owner, name
        self.floats = owner.floats.setdefault(name, InFloat(width))

    def __call__(self, original: Any, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        tiled = getattr(module, "padding_mode", "zeros") != "zeros"  # A1111's option Tiling
        if not owner.run.on or tiled or self.floats.takes(x, hosts.cast_dtype(x)):
            return original(x, *args, **kwargs)
        try:
            owner.changes.settle(module)
            change = owner.changes.difference(self.name, module)
            if change is None or owner.lora != WHOLE:
                cast = hosts.autocast(x)
                out = self._computed(lambda x: original(x, *args, **kwargs), module, cast)
                if change is None or owner.lora != SIDE or self.floats.takes(cast):
                    return out
                return out + branch(module, cast, change)
        except Exception as error:  # whatever it is, the host's own layer goes on
            owner.run.fail(f"{self.name} failed ({error}).")
        return original(x, *args, **kwargs)

    def _computed(self, own: Callable[[Tensor], Tensor], module: Any, x: Tensor) -> Tensor:
        """From codes, or by `own`: then the codes go, unless other numbers of rows want them."""
        owner = self.owner
        layer = owner.layer(self.name, module, x.device)
        out = self.floats.compute(layer, own, module.weight, x)
        if self.floats.alone(layer, x):
            owner.kept.pop(self.name, None)
            owner.changes.forget(self.name)
        return out


class Table:
    """The forward of a time-only module: its row at a calibrated step, computed at any other."""

    def __init__(self, owner: Weights, name: str, module: nn.Module, table: TemporalTable) -> None:
        self.owner, self.table = owner, table
        inside = hosts.layers(module)
        self.layers = [(f"{name}.{inner}".rstrip("."), layer) for inner, layer in inside]

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        if not owner.run.on or not owner.plan.clock.exact or self._changed():
            return original(*args, **kwargs)
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        self.table.to(first.device).dtype = hosts.cast_dtype(first)
        return self.table(*args, **kwargs)

    def _changed(self) -> bool:
        """Whether a LoRA reaches into the module: its table knows nothing of that."""
        for _, layer in self.layers:
            self.owner.changes.settle(layer)
        return any(self.owner.changes.difference(n, m) is not None for n, m in self.layers)


def branch(module: Any, x: Tensor, change: Tensor) -> Tensor:
    """What a change of the weight adds to the output of a layer, in the input's dtype."""
    weight = change.to(x)
    if isinstance(module, nn.Conv2d):
        return F.conv2d(
            x, weight, None, module.stride, module.padding, module.dilation, module.groups
        )
    return F.linear(x, weight)
