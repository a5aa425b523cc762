"""What an error at each step does to the result: the step weights lambda of HarmoniCa's IEPO.

All rules are calls `rule(run, r)`: run(weights) samples the same images with the soft decisions
`weights` (T, N) and returns the final latent (B, ...); r (T, N) are the router's present ones. The
result is fp64 (T,), the first step has 0. arXiv 2410.01723; T runs of T steps each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]


def paper(run: Run, r: Tensor) -> Tensor:
    """As printed: ||x_0 - x_0^(t)||_F^2, where x_0^(t) is sampled without reuse at step t."""
    found = torch.zeros(len(r), dtype=torch.float64)
    routed = run(r)
    for row in range(1, len(r)):
        weights = r.clone()
        weights[row] = 1
        found[row] = (routed - run(weights)).double().square().sum()
    return found


def code(run: Run, r: Tensor) -> Tensor:
    """As released: reuse is switched on step by step from the noisiest; mean squared change."""
    found = torch.zeros(len(r), dtype=torch.float64)
    weights = torch.ones_like(r)
    before = run(weights)
    for row in range(1, len(r)):
        weights[row] = r[row]
        now = run(weights)
        found[row] = (now - before).double().square().mean()
        before = now
    return found


def gain(result: Tensor, step: Tensor) -> Tensor:
    """How much a squared error of the step's own output grows on its way to the result.

    Both (T,) from `rollout.step_costs`. lambda * loss then estimates the error of the result; both
    rules above weigh a step by the error that it makes now, which the loss already contains.
    """
    found = torch.where(step > 0, result / step.clamp_min(1e-30), torch.zeros_like(step))
    found[0] = 0
    return found


RULES: dict[str, Callable[[Run, Tensor], Tensor]] = {"paper": paper, "code": code}
