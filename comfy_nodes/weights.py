"""Quantized layers in a MODEL: from an artifact, or rounded where they are, without calibration.

A layer keeps its weight and its name, so that LoRA loaders find it before and after. Codes are of
the weight as it is loaded: one that a LoRA has changed is rounded anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from tenuto.artifact import Artifact, tabled
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.model import Override, layers, override_
from tenuto.numerics import QTensor, Scheme
from tenuto.runtime import QConv2d, QLayer, QLinear, TemporalTable, follow_input
from tenuto.runtime.kernels.quantize_input import Memo
from tenuto.sampling import Clock

from .wrapping import Wrapped

PREFIX = "diffusion_model."
_run_every_op = getattr(comfy.ops, "run_every_op", lambda: None)  # since 0.3.75


class Weights(Wrapped):
    """Layers that compute with codes, and tables of what depends on the timestep alone.

    schemes: by the host's names. artifact: one in the host's names, or None: round to nearest.
    execution: as in `attach`; "int8" makes of a seed the same image in every process.
    """

    key = "tenuto_weights"

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        artifact: Artifact | None = None,
        execution: str = "int8",
        simulate: bool = False,
    ) -> None:
        super().__init__()
        self.kept: dict[str, QLayer] = {}  # they outlive an ejection: core ejects at every run
        self.token: Any = None  # what their weights were made of
        self.how: dict[str, int] = {}
        self.ran: list[str] = []  # layers of the last run
        self.schemes, self.artifact = dict(schemes), artifact
        self.options = {"wanted": execution, "simulate": simulate}
        if artifact is not None:
            self.clock = Clock(artifact.header["schedule"]["timesteps"])
            self.codes, self.ranges = artifact.section("weights"), artifact.section("ranges")

    def overrides(self, patcher: Any, denoiser: nn.Module) -> list[Override]:
        """Tables, then layers; nothing is rounded before it is used."""
        changed = {key.removeprefix(PREFIX) for key in patched(patcher)}
        dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
        found, memo = [], Memo()
        token = patcher.patches_uuid, patcher.current_hooks
        if self.token != token:
            self.kept.clear()
            self.token = token
        for name, facts in self.tables().items():
            module = denoiser.get_submodule(name)
            if any(key.startswith(f"{name}.") for key in changed):
                continue
            rows = [self._values[f"{name}.{n}"] for n in range(len(facts["outputs"]))]
            table = TemporalTable(module, rows, bool(facts["single"]), self.clock)
            table.dtype = dtype
            found.append(override_(module, Table(self, table)))
        for name, layer in layers(denoiser):
            if name in self.schemes:
                own = self.artifact is not None and f"{name}.weight" not in changed
                found.append(override_(layer, Quantized(self, name, own, memo)))
        return found

    def tables(self) -> dict[str, Any]:
        """The header's facts of the modules that are tables."""
        if self.artifact is None:
            return {}
        self._values = self.artifact.section("temporal")
        return tabled(self.artifact.header)

    def made(self, name: str, layer: Any, own: bool, memo: Memo) -> QLayer:
        """The quantized layer in place of `layer`; own: with the artifact's codes."""
        scheme = self.schemes[name]
        pair = None
        if own:
            weight = QTensor.from_tensors(self.codes, name, layer.weight.shape, scheme.weight)
        else:
            weight = RoundToNearest().weight(effective(layer).detach(), scheme.weight)
        if self.artifact is not None and scheme.activation is not None:
            known = self.ranges.get(f"{name}.scale"), self.ranges.get(f"{name}.zero_point")
            pair = known if known[0] is not None else None
        kind: Any = QConv2d if isinstance(layer, nn.Conv2d) else QLinear
        return kind(layer, weight, scheme, self.clock, pair, memo=memo, **self.options)

    def share(self, denoiser: nn.Module) -> float:
        """Share of Linear and Conv2d weights whose layer is quantized here."""
        sizes = {name: math.prod(layer.weight.shape) for name, layer in layers(denoiser)}
        return sum(sizes[n] for n in self.schemes if n in sizes) / max(1, sum(sizes.values()))

    def opened(self, times: Sequence[float]) -> Callable[[], None]:
        """What the layers did is known when the run ends: core may unload them after it."""

        def close() -> None:
            self.how = dict(Counter(layer.execution for layer in self.kept.values()))
            self.ran = sorted(self.kept)

        return close

    def detached(self, patcher: Any, unpatch_all: bool) -> None:
        """The codes go with the MODEL that core unloads."""
        if unpatch_all:
            self.kept.clear()


class Quantized:
    """The forward of one layer: from codes inside a call of ours, else the layer's own."""

    def __init__(self, owner: Weights, name: str, own: bool, memo: Memo) -> None:
        self.owner, self.name, self.own, self.memo = owner, name, own, memo

    def __call__(self, original: Any, module: nn.Module, x: Tensor, *args: Any) -> Tensor:
        if not self.owner.on:
            return original(x, *args)
        _run_every_op()
        layer = self.owner.kept.get(self.name)
        if layer is None:
            layer = self.owner.made(self.name, module, self.own, self.memo)
            self.owner.kept[self.name] = layer
        follow_input(layer, effective(module, "bias"), x.device)
        return layer(x)


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
    it, a model under dynamic VRAM (core 0.12 and later) one more that comes first. They may write
    in place, so that they get a copy.
    """
    found = getattr(layer, name)
    first = getattr(layer, f"{name}_lowvram_function", None)
    changes = [
        *([] if first is None else [first]),
        *(getattr(layer, f"{name}_function", None) or ()),
    ]
    if found is None or not changes:
        return found
    wide = torch.float32 if found.element_size() < 2 else found.dtype  # nothing adds in fp8
    changed = found.detach().to(wide, copy=True)
    for change in changes:
        changed = change(changed)
    return changed


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
            return found[0]
        return (
            kept.weight if kept is not None else patcher.model.diffusion_model.get_parameter(name)
        )

    return tensor
