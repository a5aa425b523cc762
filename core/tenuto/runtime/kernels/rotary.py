"""Turn the pairs of a query's or key's columns by angles, after its norm, in one pass.

    [a, b] -> [a cos - b sin, b cos + a sin],   of x, or of x / rms(x) * weight
(rotary embeddings: Su et al. 2021, arXiv 2104.09864.) a and b are neighbours, or columns i and
i + D / 2. Compilers read and write a query several times for that, see `fused_rotary.py`. Sums are
fp32, and nothing is rounded in between. On CUDA a kernel of Triton does it, elsewhere plain
operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel import graph_operation
from .quantize_input import FLOATS, triton_runs

WIDEST = 2**10  # columns of a head


def reference(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, halves: bool
) -> Tensor:
    """x (A, B, C, D) turned. weight: (D,), of a norm before; None: there is none.

    cos, sin: as x, A, B and C may be 1 or missing; of every column, or (..., D / 2) of every pair.
    halves: pairs are columns i and i + D / 2; else 2 i and 2 i + 1.
    """
    y = x.float()
    if weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    a, b = _pairs(y, halves)
    (c, e), (s, t) = ((v, v) if _shared(x, v) else _pairs(v, halves) for v in (cos, sin))
    turned = (a * c - b * s, b * e + a * t)
    y = torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)
    return y.to(x.dtype)


def _pairs(x: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    a, b = x.float().chunk(2, -1) if halves else x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return a, b


def _shared(x: Tensor, angles: Tensor) -> bool:
    return 2 * angles.shape[-1] == x.shape[-1]


def runs_on(x: Tensor) -> bool:
    """Whether the kernel takes such an input."""
    fits = x.ndim == 4 and 2 <= x.shape[-1] <= WIDEST and x.shape[-1] % 2 == 0
    return fits and x.device.type == "cuda" and x.dtype in FLOATS and triton_runs(x.device.index)


def _turn(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, halves: bool
) -> Tensor:
    if x.is_cuda and x.numel() and runs_on(x):
        from .rotary_triton import turn as fused

        return fused(x, weight, eps, cos, sin, halves)
    return reference(x, weight, eps, cos, sin, halves)


def _fake_turn(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


turn = graph_operation(
    "turn(Tensor x, Tensor? weight, float eps, Tensor cos, Tensor sin, bool halves) -> Tensor",
    _turn,
    _fake_turn,
)
