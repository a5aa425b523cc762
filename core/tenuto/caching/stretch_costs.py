"""What it costs to skip the calls after a computed one: all stretches of a run at once."""

from __future__ import annotations

import torch
from torch import Tensor


def stretch_costs(
    outputs: Tensor, gains: Tensor, times: Tensor, ridge: float, states: Tensor, last: Tensor
) -> Tensor:
    """The cost of skipping all calls after the newest tap of a state to the `last` ones: (S, n).

    Of gains[t] * (output_t - its least-squares forecast from the taps), summed, the square. As a
    forecast is linear in the output, the sum of them is the forecast of one output: of the sum.

    outputs: float64 (T, R), as rows. gains, times: (T,). ridge: toward linear extrapolation in the
    time. states: int64 (S, 3), taps from the newest on, -1 for none. last: int64 (S, n).
    """
    sums = (gains[:, None] * outputs).cumsum(0)  # (T, R): up to each step
    among, toward = sums @ sums.T, sums @ outputs.T
    newest, known = states[:, :1], states >= 0
    taps = states.clamp_min(0)
    whole = among.diagonal()[last] - 2 * among[newest, last] + among[newest, newest]
    square = (outputs @ outputs.T)[taps[:, :, None], taps[:, None, :]]
    square = square * (known[:, :, None] & known[:, None, :])
    wanted = toward[last[:, :, None], taps[:, None, :]] - toward[newest, taps][:, None, :]
    wanted = wanted * known[:, None, :]  # (S, n, 3)
    weights = _solved(
        square + torch.diag_embed(torch.where(known, ridge, 1.0).double()),
        wanted + ridge * _linear(gains, times, states, last),
    )
    explained = (weights * (2 * wanted - weights @ square)).sum(-1)
    return (whole - explained).clamp_min(0)


def _linear(gains: Tensor, times: Tensor, states: Tensor, last: Tensor) -> Tensor:
    """Linear extrapolation in the time from the two newest taps: (S, n, 3).

    Of all calls after the newest tap to the `last` ones, times their gains, summed.
    """
    sums = torch.stack([gains, gains * times]).cumsum(1)
    newest, before = states[:, :1], states[:, 1:2]
    whole, moved = sums[:, last] - sums[:, newest]
    slope = (moved - times[newest] * whole) / (times[newest] - times[before])
    return torch.stack([whole + slope, -slope, torch.zeros_like(slope)], dim=-1)


def _solved(square: Tensor, wanted: Tensor) -> Tensor:
    """x with square @ x = wanted, by Cholesky: (S, 3, 3) and (S, n, 3), to (S, n, 3).

    Written out: libraries take a call for each of so many small ones.
    """
    a = square
    root0 = a[:, 0, 0].sqrt()
    low10, low20 = a[:, 1, 0] / root0, a[:, 2, 0] / root0
    root1 = (a[:, 1, 1] - low10.square()).sqrt()
    low21 = (a[:, 2, 1] - low20 * low10) / root1
    root2 = (a[:, 2, 2] - low20.square() - low21.square()).sqrt()
    root0, root1, root2, low10, low20, low21 = (
        x[:, None] for x in (root0, root1, root2, low10, low20, low21)
    )
    y0 = wanted[..., 0] / root0
    y1 = (wanted[..., 1] - low10 * y0) / root1
    y2 = (wanted[..., 2] - low20 * y0 - low21 * y1) / root2
    x2 = y2 / root2
    x1 = (y1 - low21 * x2) / root1
    x0 = (y0 - low10 * x1 - low20 * x2) / root0
    return torch.stack([x0, x1, x2], dim=-1)
