"""`Host`: what an adapter offers for its kind of model. One file an adapter, one contract for all.

The cases of the contract are in tests/hosts; docs/hosts.md has the table of what holds where.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..model import Attached, KeyMap, denoiser_of, families
from ..sampling import Clock, follow
from .attachment import attach
from .layers import QLayer


@dataclass(frozen=True)
class Patches:
    """What is to be put into a model: an artifact, with or without its route.

    execution and simulate: as in `attach`.
    """

    artifact: Artifact
    route: bool = True
    execution: str = "auto"
    simulate: bool = False


class Host(Protocol):
    """An adapter. `handle` is what its users hold: a pipeline, a denoiser, a MODEL."""

    def denoiser(self, handle: Any) -> nn.Module:
        """The denoiser inside `handle`."""
        ...

    def names(self, handle: Any) -> KeyMap | None:
        """Where canonical names are in this host; None where they are the host's own."""
        ...

    def install(self, handle: Any, patches: Patches) -> Attached:
        """Put `patches` in. `.handle` is what is used from then on, `.detach()` restores.

        Some hosts change `handle` itself, others return a copy. TenutoError before anything
        changes if the artifact is for another model.
        """
        ...

    def follow(self, handle: Any, clock: Clock) -> AbstractContextManager[Clock]:
        """Keep `clock` at the step of every call of the denoiser."""
        ...


class InPlace:
    """Diffusers pipelines and bare denoisers of any code (ldm's U-Net too): changed in place."""

    def denoiser(self, handle: Any) -> nn.Module:
        """The denoiser of a pipeline, or the module itself."""
        return denoiser_of(handle)

    def names(self, handle: Any) -> KeyMap | None:
        """By the class of the denoiser."""
        return families.key_map_of(denoiser_of(handle))

    def install(self, handle: Any, patches: Patches) -> Attached:
        """`attach`."""
        return attach(
            handle,
            patches.artifact,
            execution=patches.execution,
            simulate=patches.simulate,
            route=patches.route,
        )

    def follow(self, handle: Any, clock: Clock) -> AbstractContextManager[Clock]:
        """By a hook on the denoiser."""
        return follow(handle, clock)


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
