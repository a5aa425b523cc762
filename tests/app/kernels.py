"""Kernels of a denoiser's outputs that nobody recorded: enough to plan a forecast from."""

from __future__ import annotations

import torch

from tenuto.sampling.output_kernel import OutputKernel


def kernel(steps: int = 20) -> OutputKernel:
    """Of smooth random outputs, on a cosine schedule."""
    angle = torch.linspace(1.5, 0.05, steps, dtype=torch.float64)
    gap = angle[:, None] - angle
    values = torch.exp(-gap.square() / 0.7) + 1e-3 * torch.eye(steps, dtype=torch.float64)
    times = tuple(torch.linspace(999, 49, steps, dtype=torch.float64).tolist())
    alpha, sigma = tuple(angle.cos().tolist()), tuple(angle.sin().tolist())
    return OutputKernel(values, times, alpha, sigma, "v", 4)
