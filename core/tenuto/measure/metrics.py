"""Distances by arithmetic alone: PSNR and SSIM of images, FID and KID of sets of features.

PSNR and SSIM take two tensors (N, C, H, W) of one shape and give one number per image.
`data_range` is the width of the values: 2 for [-1, 1], the library's images; 1 for [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import TenutoError

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def psnr(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, fp64 (N,): 10 log10(data_range² / mean squared difference).

    Infinite for equal images.
    """
    same_shape(a, b)
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity, fp64 (N,), at most 1; images of 11 x 11 or more.

    Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, IEEE TIP 13 (2004), equation 13, as
    their code computes it: 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, only windows
    that lie inside the image, no downsampling. The mean over channels of the per-channel SSIM.
    """
    same_shape(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise TenutoError(f"SSIM needs images of {WINDOW} x {WINDOW} or more, not {_size(a)}.")
    x, y = a.double(), b.double()
    mean_x, mean_y, xx, yy, xy = (_blur(v) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    likeness = likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return likeness.flatten(1).mean(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The squared Frechet distance of two sets of features (N, D) and (M, D), taken as Gaussians.

    |mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a C_b)^1/2), covariances with N - 1 and M - 1, in fp64
    on the features' device. It is FID where the features are those of the 2015 Inception network
    (Heusel et al., NeurIPS 2017, equation 6); it falls with N, so name N beside it.
    """
    a, b = _features(a, b)
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # C_a C_b has the eigenvalues of the symmetric root C_b root
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The squared maximum mean discrepancy of features (N, D) and (M, D), unbiased, in fp64.

    The kernel is (x y / D + 1)³; over all features at once, not a mean over subsets. It is KID
    (Binkowski et al., ICLR 2018, equation 4 and section 4) on Inception features. It can be less
    than 0: its mean is 0 for sets of one distribution.
    """
    a, b = _features(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def pairs(x: Tensor) -> Tensor:  # the mean over pairs of different members
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(pairs(a) + pairs(b) - 2 * kernel(a, b).mean())


def _features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp64; TenutoError unless they are sets of two or more of one width."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise TenutoError(
            "Two sets of features (N, D) of one width, two or more each, are compared, "
            f"not {_size(a)} and {_size(b)}."
        )
    return a.double(), b.double()


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
