"""What outputs have in common at steps that were not recorded, from the recorded ones.

Outputs are taken for a smooth random function of the noise, in log(sigma / alpha): what lies
between recorded steps, or beyond the last, is the best combination of them, and beside it a part
that they do not know. How large that is, leaving out each recorded step in turn tells. A plan that
took the combination for the whole output would skip just the steps of which nothing was recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 0.03  # of either share of noise, within which it makes no difference how little there is
REACH = 2.0  # of log(sigma / alpha), over which outputs stay alike
JITTER = 1e-10
SAME = 1e-9  # steps no further apart are the same


def depth(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Where a share of noise is, evenly for outputs: about log(sigma / alpha), but finite."""
    return torch.log((sigma + FLOOR) / (alpha + FLOOR))


def between(values: Tensor, known: Tensor, places: Tensor) -> Tensor:
    """The products of outputs at `places`, float64 (n, n), from those at `known` ones, (T, T).

    known, places: `depth`, float64. At a place that is known they are as they were.
    """
    size = len(known)
    inverse = torch.linalg.inv(_alike(known, known) + JITTER * torch.eye(size, dtype=known.dtype))
    across = _alike(places, known)
    mixed = across @ inverse  # (n, T): the best combination of the known outputs
    left = _alike(places, places) - mixed @ across.T  # the share that they do not know
    own = 1 / inverse.diagonal()  # the same share of each known one, from the others
    apart = own[:, None] * inverse  # (T, T): known outputs, each less its best combination
    errors = (apart @ values @ apart.T).diagonal()
    sizes = (errors / own).clamp_min(1e-30)
    scale = _level(sizes.log(), known, places).mul(0.5).exp()
    near, row = (places[:, None] - known).abs().min(1)
    same = near < SAME
    scale = scale.masked_fill(same, 0.0)
    exact = torch.nn.functional.one_hot(row, size).to(mixed)
    mixed = torch.where(same[:, None], exact, mixed)
    found = mixed @ values @ mixed.T + scale[:, None] * left * scale
    return (found + found.T) / 2


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """How alike outputs are that lie so far apart, from 0 to 1 (Matern, 5/2): (len(a), len(b))."""
    gap = (a[:, None] - b).abs() * (5**0.5 / REACH)
    return (1 + gap + gap.square() / 3) * torch.exp(-gap)


def _level(values: Tensor, known: Tensor, places: Tensor) -> Tensor:
    """`values` at `known` places, linear between them and level beyond: (n,)."""
    order = known.argsort()
    at, values = known[order], values[order]
    right = torch.searchsorted(at, places.contiguous()).clamp(1, len(at) - 1)
    gap = (at[right] - at[right - 1]).clamp_min(1e-12)
    share = ((places - at[right - 1]) / gap).clamp(0, 1)
    return values[right - 1] + share * (values[right] - values[right - 1])
