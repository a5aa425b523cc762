"""The one call of the denoiser that `check(run=True)` makes: its time, its work, its time path."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...model import Backbone, Leave, Signature, frozen, map_tensors, multiply_adds, watched
from ...sampling import Call, PipelineCall, Sample
from ..temporal.discovery import discover
from . import estimates


@dataclass(frozen=True)
class Trial:
    """What one call says. seconds: a row of it. share: of its multiply-adds that is in branches.

    temporal: modules that depend on the timestep alone, where no family says them.
    """

    seconds: float
    share: float
    temporal: tuple[str, ...] | None


def first_inputs(
    denoiser: nn.Module, asked: PipelineCall | None, sample: Sample | None
) -> dict[str, Any]:
    """What a run gives the denoiser first; the run ends there. TenutoError if it gives nothing."""
    facts, seen = Signature(denoiser), list[dict[str, Any]]()

    def keep(name: str, args: Any, kwargs: Any) -> None:
        inputs = facts.inputs(args, kwargs)
        seen.append(map_tensors(lambda x: x.detach().clone(), inputs))
        raise Leave

    with watched(denoiser, before=keep, first=True), suppress(Leave), torch.no_grad():
        if sample is not None:
            sample(denoiser, 0, 1)
        elif asked is not None:
            asked(denoiser, 0, 1, "latent")
    if not seen:
        raise ModelError("The run did not call the denoiser.")
    return seen[0]


def trial(
    denoiser: nn.Module, backbone: Backbone, inputs: dict[str, Any], device: torch.device
) -> Trial:
    """Time a call, count its work, and look for time-only modules if no family names them."""
    rows = Signature(denoiser).batch(inputs)
    names: Sequence[str] = [branch.name for branch in backbone.branches]
    with frozen(denoiser):
        seconds = estimates.seconds_of(denoiser, inputs, device) / max(1, rows)
        counts = multiply_adds(denoiser, (), inputs, names=names)
        temporal: tuple[str, ...] | None = backbone.temporal
        if backbone.family == "generic" and not temporal:
            temporal = None
            with suppress(ModelError, RuntimeError, LookupError, TypeError, ValueError):
                temporal = discover(denoiser, Call(0, 0, 0.0, inputs))
    share = sum(counts[name] for name in names) / max(1, counts[""])
    return Trial(seconds, share, temporal)
