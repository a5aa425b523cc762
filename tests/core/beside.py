"""What tests of `attach` beside other things share: runs, their distance, a route."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.model import denoiser_of


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def drawn(loop: Any, kind: str, model: nn.Module, **settings: Any) -> Tensor:
    """The images of one run."""
    with torch.no_grad():
        return loop(kind, **settings)(model, 1, 2)


def route(model: Any, trajectory: Any, keep: int = 1) -> tn.Artifact:
    """Everything is reused after the first `keep` steps."""
    artifact = tn.Artifact.new(model, trajectory.schedule())
    names = [branch.name for branch in tn.describe(denoiser_of(model)).branches]
    times = list(trajectory.timesteps)
    artifact.header["route"] = {"timesteps": times, "branches": names}
    table = torch.zeros(len(times), len(names), dtype=torch.bool)
    table[:keep] = True
    artifact.tensors["route/table"] = table
    return artifact
