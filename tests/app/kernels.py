"""Kernels of a denoiser's outputs that nobody recorded: enough to plan a forecast from."""

from __future__ import annotations

from pathlib import Path

import torch

from tenuto.artifact import Artifact
from tenuto.sampling.output_kernel import OutputKernel


def kernel(steps: int = 20) -> OutputKernel:
    """Of smooth random outputs, on a cosine schedule."""
    angle = torch.linspace(1.5, 0.05, steps, dtype=torch.float64)
    gap = angle[:, None] - angle
    values = torch.exp(-gap.square() / 0.7) + 1e-3 * torch.eye(steps, dtype=torch.float64)
    times = tuple(torch.linspace(999, 49, steps, dtype=torch.float64).tolist())
    alpha, sigma = tuple(angle.cos().tolist()), tuple(angle.sin().tolist())
    return OutputKernel(values, times, alpha, sigma, "v", 4)


def without_forecast(path: Path) -> Artifact:
    """An artifact as of before there were forecasts."""
    found = Artifact.load(path)
    header = {name: value for name, value in found.header.items() if name != "forecast"}
    kept = {n: x for n, x in found.tensors.items() if not n.startswith("forecast/")}
    return Artifact(header, kept)
