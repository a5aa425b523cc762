"""The timesteps of a run: in the unit that the denoiser gets, and where they are among others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SCALES = ((1.0, False), (1e-3, False), (1e-3, True))  # t, t / 1000, 1 - t / 1000
NEAR = 5e-3  # of the span: half precision rounds timesteps


def grid_from(times: Any, first: float) -> tuple[float, ...]:
    """The timesteps of a run whose first call is at `first`; () where `times` do not fit it.

    times: of the scheduler, in executed order; what is there twice (two evaluations a step) counts
    once. A run that starts at less noise (image to image) has those from `first` on. Where several
    units fit, the one of the most steps: 1.0 is the first of 1000 ... 1, over 1000, not the last.
    """
    try:
        raw = torch.as_tensor(times).detach().cpu().double().flatten().unique_consecutive().tolist()
    except (TypeError, ValueError, RuntimeError):
        return ()
    best: tuple[int, float, tuple[float, ...]] = (0, 0.0, ())
    for scale, flipped in SCALES:
        found = [1 - t * scale if flipped else t * scale for t in raw]
        start = min(range(len(found)), key=lambda i: abs(found[i] - first), default=0)
        span = max(found, default=0.0) - min(found, default=0.0) or 1.0
        gap = abs(found[start] - first) / span if found else 1.0
        rest = tuple(found[start:])
        if gap < NEAR and (len(rest), -gap) > best[:2]:
            best = len(rest), -gap, rest
    return best[2]


def places_of(timesteps: Sequence[float], known: Sequence[float]) -> Tensor:
    """Where `timesteps` are among the `known` ones, as fractional rows 0 ... T - 1: float64 (n,).

    known: in executed order, falling or rising.
    """
    sign = -1.0 if known[0] >= known[-1] else 1.0
    old = torch.tensor(known, dtype=torch.float64) * sign
    new = torch.tensor(timesteps, dtype=torch.float64).mul(sign).clamp(old[0], old[-1])
    right = torch.searchsorted(old, new).clamp(1, max(1, len(old) - 1))
    if len(old) == 1:
        return torch.zeros(len(new), dtype=torch.float64)
    left = right - 1
    share = (new - old[left]) / (old[right] - old[left]).clamp_min(1e-12)
    return left + share.clamp(0, 1)


def boundary(pipeline: Any) -> float | None:
    """The timestep, as its scheduler counts, below which a pipeline calls its second denoiser.

    Wan 2.2 has one; None: each denoiser is called at every step, or who is called is not known.
    """
    ratio = getattr(getattr(pipeline, "config", None), "boundary_ratio", None)
    config = getattr(getattr(pipeline, "scheduler", None), "config", None)
    whole = getattr(config, "num_train_timesteps", None)
    return None if ratio is None or whole is None else ratio * whole


def own_times(pipeline: Any, times: Any, name: str) -> Any:
    """Those of a scheduler's timesteps at which a pipeline calls the denoiser called `name`.

    Wan 2.2 has one for the noise from a boundary on, and `transformer_2` for what is below it; all
    other denoisers are called at every step.
    """
    least = boundary(pipeline)
    if least is None or not isinstance(times, Tensor):
        return times
    high = times >= least
    return times[~high if name.endswith("_2") else high]
