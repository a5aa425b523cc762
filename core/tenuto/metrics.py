"""Distances between two batches of pictures by arithmetic alone: PSNR and SSIM.

Each takes two tensors (N, C, H, W) of one shape and gives one number per picture. `data_range` is
the width of the values: 2 for [-1, 1], the library's pictures; 1 for [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import TenutoError

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def psnr(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, fp64 (N,): 10 log10(data_range² / mean squared difference).

    Infinite for equal pictures.
    """
    same_shape(a, b)
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity, fp64 (N,), at most 1; pictures of 11 x 11 or more.

    Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, IEEE TIP 13 (2004), equation 13, as
    their code computes it: 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, only windows
    that lie inside the picture, no downsampling. The mean over channels of the per-channel SSIM.
    """
    same_shape(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise TenutoError(f"SSIM needs pictures of {WINDOW} x {WINDOW} or more, not {_size(a)}.")
    x, y = a.double(), b.double()
    mean_x, mean_y, xx, yy, xy = (_blur(v) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    likeness = likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return likeness.flatten(1).mean(1)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) by linear interpolation; infinities are allowed."""
    ordered = sorted(values)
    place = q / 100 * (len(ordered) - 1)
    low = math.floor(place)
    lower, upper = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    return lower if place == low or lower == upper else lower + (place - low) * (upper - lower)


def same_shape(a: Tensor, b: Tensor) -> None:
    """Raises TenutoError unless both are (N, C, H, W) of one shape."""
    if a.shape != b.shape or a.ndim != 4:
        raise TenutoError(
            f"Two batches (N, C, H, W) of one shape are compared, not {_size(a)} and {_size(b)}."
        )


def _size(x: Tensor) -> str:
    return " x ".join(str(n) for n in x.shape)


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean round each pixel whose window lies inside: (N, C, H - 10, W - 10)."""
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    line = torch.exp(-(offset**2) / (2 * SIGMA**2))
    line = line / line.sum()
    planes = x.flatten(0, 1)[:, None]  # (N C, 1, H, W)
    planes = F.conv2d(F.conv2d(planes, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
    return planes.view(*x.shape[:2], *planes.shape[-2:])
