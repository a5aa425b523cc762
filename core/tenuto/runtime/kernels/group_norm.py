"""What a group norm multiplies channels by and adds to them, of images with channels last.

    norm(x + plus) = x * times + offset,   times and offset (B, C, 1, 1)
torch's group norm turns such images over to channels first and back, and compilers read them in
small pieces. Here a pass reads them as they lie; what is multiplied and added is left to whatever
comes after, so that a compiler does it together with the activation: see `fused_group_norm.py`.
Group normalization: Wu and He 2018, arXiv 1803.08494. On CUDA a kernel of Triton does it, elsewhere
plain operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel import graph_operation
from .quantize_input import FLOATS, triton_runs


def reference(
    x: Tensor, plus: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """times, offset (B, C, 1, 1), fp32, of x (B, C, H, W); plus (B or 1, C, 1, 1).

    weight, bias: (C,), those of the norm.
    """
    y = x.float()
    shift = torch.zeros_like(y[:1, :, :1, :1]) if plus is None else plus.float()
    grouped = (y + shift).reshape(len(y), groups, -1)
    mean = grouped.mean(-1)
    inverse = torch.rsqrt(grouped.var(-1, correction=0) + eps)
    of_channels = y.shape[1] // groups
    mean, inverse = (v.repeat_interleave(of_channels, 1)[:, :, None, None] for v in (mean, inverse))
    times = inverse if weight is None else inverse * weight.float()[None, :, None, None]
    offset = (shift - mean) * times
    return times, offset if bias is None else offset + bias.float()[None, :, None, None]


def last(x: Tensor) -> bool:
    """Whether images (B, C, H, W) have their channels last, in memory, and not also first."""
    return (
        x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    )


def _factors(
    x: Tensor, plus: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    own = x.is_cuda and x.numel() and last(x) and x.dtype in FLOATS
    if own and triton_runs(x.device.index):
        from .group_norm_triton import factors as fused

        return fused(x, plus, groups, weight, bias, eps)
    return reference(x, plus, groups, weight, bias, eps)


def _fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], 1, 1)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


factors = graph_operation(
    "group_factors(Tensor x, Tensor? plus, int groups, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)",
    _factors,
    _fake,
)
