"""Quantized layers in a MODEL: from an artifact, or rounded where they are, without calibration.

A layer keeps its weight and its name, so that LoRA loaders find it before and after. Codes are of
the weight as it is loaded: one that a LoRA has changed is rounded anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.ops
from torch import Tensor, nn

from tenuto.model import Override, layers, override_
from tenuto.runtime import (
    InFloat,
    QLayer,
    Replacements,
    TemporalTable,
    executions,
    follow_input,
    with_changes,
)

from .coded_weights import CodedWeight, known
from .wrapping import Wrapped

PREFIX = "diffusion_model."
_run_every_op = getattr(comfy.ops, "run_every_op", lambda: None)  # since 0.3.75


class Weights(Wrapped):
    """Layers that compute with codes, and tables of what depends on the timestep alone."""

    key = "tenuto_weights"

    def __init__(self, plan: Replacements) -> None:
        super().__init__()
        self.kept: dict[str, QLayer] = {}  # they outlive an ejection: core ejects at every run
        self.floats: dict[str, InFloat] = {}  # what core's own layers compute in place of them
        self.rounded = False  # whether layers were made since the last run ended
        self.token: Any = None  # what their weights were made of
        self.how: dict[str, int] = {}
        self.ran: list[str] = []  # layers of the last run
        self.plan, self.clock = plan, plan.clock

    def overrides(self, patcher: Any, denoiser: nn.Module) -> list[Override]:
        """Tables, then layers; nothing is rounded before it is used."""
        changed = {key.removeprefix(PREFIX) for key in patched(patcher)}
        dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
        found = []
        token = patcher.patches_uuid, patcher.current_hooks
        if self.token != token:
            self.forget()
            self.token = token
        for name in self.plan.tables:
            module = denoiser.get_submodule(name)
            if any(key.startswith(f"{name}.") for key in changed):
                continue
            table = self.plan.table(name, module)
            table.dtype = dtype
            found.append(override_(module, Table(self, table)))
        for name, layer in layers(denoiser):
            if name in self.plan.schemes:
                own = f"{name}.weight" not in changed
                width = layer.weight.shape[1]
                found.append(override_(layer, Quantized(self, name, own, width)))
        return found

    def layer(self, name: str, module: Any, own: bool) -> QLayer:
        """The quantized layer in place of `module`; own: its weight is as the codes are of."""
        found = self.kept.get(name)
        if found is None:
            self.rounded = True
            weight = None if own and self.plan.codes else effective(module)
            found = self.kept[name] = self.plan.layer(name, module, weight)
        return found

    def opened(self, times: Sequence[float], sampler: Any, guider: Any) -> Callable[[], None]:
        """What the layers did is known when the run ends: core may unload them after it.

        Keys and values of a prompt that a denoiser keeps longer than a run (HiDream-O1) are those
        of the weights that it had: they are forgotten before a run and after it.
        """
        forget = getattr(guider.model_patcher.model.diffusion_model, "clear_kv_cache", lambda: None)
        forget()

        def close() -> None:
            forget()
            done = executions(self.kept, self.floats)
            self.how, self.ran = dict(Counter(done.values())), sorted(done)
            if self.rounded:  # what rounding and timing took is torch's still
                self.rounded = False
                comfy.model_management.soft_empty_cache()

        return close

    def forget(self) -> None:
        """No weight is as it was: codes go, and what was decided with them."""
        self.kept.clear()
        for one in self.floats.values():
            one.decided.clear()

    def detached(self, patcher: Any, unpatch_all: bool) -> None:
        """The codes go with the MODEL that core unloads."""
        if unpatch_all:
            self.forget()


class Quantized:
    """The forward of one layer: from codes inside a call of ours, else the layer's own.

    width: of its input. Where "auto" decides for float, that is the layer's own forward, unless its
    weight was given up.
    """

    def __init__(self, owner: Weights, name: str, own: bool, width: int) -> None:
        self.owner, self.name, self.own = owner, name, own
        self.floats = owner.floats.setdefault(name, InFloat(width))

    def __call__(self, original: Any, module: Any, x: Tensor, *args: Any) -> Tensor:
        if not self.owner.on or self.floats.takes(x):
            return original(x, *args)
        _run_every_op()
        layer = self.owner.layer(self.name, module, self.own)
        follow_input(layer, effective(module, "bias"), x.device)
        if isinstance(module.weight, CodedWeight):
            return layer(x)
        out = self.floats.compute(layer, lambda x: original(x, *args), module.weight, x)
        if self.floats.alone(layer, x):
            self.owner.kept.pop(self.name, None)
        return out


class Table:
    """The forward of a time-only module: its row at a calibrated step, computed at any other."""

    def __init__(self, owner: Weights, table: TemporalTable) -> None:
        self.owner, self.table = owner, table

    def __call__(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.owner.on or not self.owner.clock.exact:
            return original(*args, **kwargs)
        return self.table(*args, **kwargs)


def effective(layer: Any, name: str = "weight") -> Any:
    """The weight (or the bias) that a layer computes with; None where it has none.

    What core has not merged yet it applies at every call: a partly loaded model has functions for
    it, a model under dynamic VRAM (core 0.12 and later) one more that comes first.
    """
    found = getattr(layer, name)
    first = getattr(layer, f"{name}_lowvram_function", None)
    changes = [
        *([] if first is None else [first]),
        *(getattr(layer, f"{name}_function", None) or ()),
    ]
    return with_changes(found, changes) if found is not None and changes else found


def patched(patcher: Any) -> set[str]:
    """Keys of the weights that a LoRA or a hook changes."""
    hooked = (key for group in patcher.hook_patches.values() for key in group)
    return {key if isinstance(key, str) else key[0] for key in (*patcher.patches, *hooked)}


def unpatched(patcher: Any) -> Any:
    """tensor(name): a parameter of the denoiser as it is without the LoRAs merged in it."""

    def tensor(name: str) -> Tensor:
        kept = patcher.backup.get(PREFIX + name)
        found = patcher.hook_backup.get(PREFIX + name)
        if found is not None:
            return known(found[0])
        own = patcher.model.diffusion_model.get_parameter(name) if kept is None else kept.weight
        return known(own)

    return tensor
