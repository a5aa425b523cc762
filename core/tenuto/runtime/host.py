"""`Host`: what an adapter offers for its kind of model. One file an adapter, one contract for all.

The cases of the contract are in tests/hosts; docs/hosts.md has the table of what holds where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..model import Attached, KeyMap, denoiser_of, key_map_of
from .attachment import install
from .execution import DENSE, rows_of
from .kernels.quantize_input import compiling
from .layers import QLayer
from .replacements import Patches


class Host(Protocol):
    """An adapter. `handle` is what its users hold: a pipeline, a denoiser, a MODEL."""

    def denoiser(self, handle: Any) -> nn.Module:
        """The denoiser inside `handle`."""
        ...

    def names(self, handle: Any) -> KeyMap | None:
        """Where canonical names are in this host; None where they are the host's own."""
        return key_map_of(self.denoiser(handle))

    def install(self, handle: Any, patches: Patches) -> Attached:
        """Put `patches` in. `.handle` is what is used from then on, `.detach()` restores.

        Some hosts change `handle` itself, others return a copy. TenutoError before anything
        changes if the artifact is for another model.
        """
        ...


class InPlace(Host):
    """Diffusers pipelines and bare denoisers of any code (ldm's U-Net too): changed in place."""

    def denoiser(self, handle: Any) -> nn.Module:
        """The denoiser of a pipeline, or the module itself."""
        return denoiser_of(handle)

    def install(self, handle: Any, patches: Patches) -> Attached:
        """`attach`."""
        return install(handle, patches)


def as_chosen(patches: Patches) -> Patches:
    """`patches` where a host's user has a speedup to choose: off is off, whatever the file says."""
    if patches.artifact is None or patches.speedup is not None:
        return patches
    return replace(patches, artifact=_without_forecast(patches.artifact))


def _without_forecast(artifact: Artifact) -> Artifact:
    header = {key: value for key, value in artifact.header.items() if key != "forecast"}
    tensors = {k: t for k, t in artifact.tensors.items() if not k.startswith("forecast/")}
    parts = {name: _without_forecast(part) for name, part in artifact.parts.items()}
    return Artifact(header, tensors, parts)


def follow_input(layer: QLayer, bias: Tensor | None, device: torch.device) -> None:
    """Move `layer` to where its input is, and give it the host's bias there.

    Hosts exchange a bias when a LoRA changes it, and keep what they offload on the CPU.
    """
    if layer.weight_scale.device != device:
        layer.to(device)
    if bias is not None and (bias.device != device or not isinstance(bias, nn.Parameter)):
        bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
    if layer.bias is not bias:
        layer.bias = bias


class InFloat:
    """A layer that its host keeps in float: for which inputs "auto" leaves it to the host.

    They need no codes: `takes` is asked first. decided, of each: about how many rows of `width`
    values, their dtype, where they are.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.decided: set[tuple[int, torch.dtype, torch.device]] = set()

    def takes(self, x: Tensor, dtype: torch.dtype | None = None) -> bool:
        """Whether the host computes `x`. dtype: what its autocast makes of it."""
        if not self.decided:
            return False
        rows, own = rows_of(x, self.width)
        return (rows, dtype or own, x.device) in self.decided

    def compute(
        self, layer: QLayer, own: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor
    ) -> Tensor:
        """`layer` on `x`; under "auto" `own` where it is faster, the host's forward.

        It is timed in place of the float layer with the codes' values, as it is: with the host's
        casts and LoRAs. weight: the host's; where it lies is what that costs depends on.
        """
        key, fixed = rows_of(x, self.width), layer.scheme.activation is None or layer.simulate
        if layer.wanted != "auto" or fixed or compiling() or layer.choices.get(key) is not None:
            return layer(x)
        for rows, dtype, device in self.decided:
            if device == x.device:  # `layer` was made anew
                layer.choices.setdefault((rows, dtype), None)
        layer.own = own
        layer.place = ("in a host", f"{weight.dtype} on {weight.device.type}")
        try:
            out = layer(x)
        finally:
            layer.own, layer.place = None, ()
        able = layer._candidates(x.dtype)
        if layer.choices.get(key, able[0] if able else None) is None:
            self.decided.add((*key, x.device))
        return out

    def alone(self, layer: QLayer, x: Tensor) -> bool:
        """Whether the host computes `x` and all else that `layer` was called for: codes may go."""
        return self.takes(x) and all(kernel is None for kernel in layer.choices.values())


def executions(layers: Mapping[str, QLayer], floats: Mapping[str, InFloat]) -> dict[str, str]:
    """How each layer computes that was called, by name: `QLayer.execution`."""
    found = {name: DENSE for name, one in floats.items() if one.decided}
    return found | {name: layer.execution for name, layer in layers.items()}


def with_changes(found: Tensor, changes: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """A host's weight (or bias) with its functions applied, in the dtype that it computes in.

    They may write in place, so that they get a copy; nothing can be added in fp8.
    """
    wide = torch.float32 if found.element_size() < 2 else found.dtype
    changed = found.detach().to(wide, copy=True)
    for change in changes:
        changed = change(changed)
    return changed
