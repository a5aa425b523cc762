"""How much of an error in one step's output is left at the end of a run, as measured.

A kernel of outputs says how an error moves the sample at once; what the later calls make of it
depends on the model. A denoiser whose condition says nearly everything corrects early errors a
thousandfold. So each step's output is once replaced by its forecast, and the result compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Signature, map_tensors, override_, tensors_in
from .output_kernel import OutputKernel

TRIALS = 10  # steps that are measured, at most: each costs the calls after it
TAPS = 3
EXACT = 1e-5  # by how much a repeated run may differ, relative


def with_remaining(
    kernel: OutputKernel, denoiser: nn.Module, run: Callable[[], Tensor]
) -> OutputKernel:
    """`kernel` with `remaining` of each step; as it is where `run` does not repeat itself.

    run(): a run of the sampler, with the same noise each time; returns its results (B, ...).
    """
    trial = _Trial(kernel, denoiser)
    plain = trial(run, None)
    same = trial(run, len(kernel.timesteps))
    if plain.shape != same.shape or float((same - plain).norm()) > EXACT * float(plain.norm()):
        return kernel
    theory, found = kernel.gains().abs(), dict[int, float]()
    for step in _spread(len(kernel.timesteps)):
        moved = (trial(run, step) - plain).flatten(1).square().mean(1).median()
        gain = math.sqrt(float(moved)) / trial.error if trial.error > 0 else math.nan
        left = gain / max(float(theory[step]), 1e-12)
        if math.isfinite(left) and left > 0:
            found[step] = left
    if not found:
        return kernel
    return replace(kernel, remaining=_filled(found, len(kernel.timesteps)))


class _Trial:
    """A denoiser's calls, kept in the first run; then one step's are forecast, those before said.

    error: root mean square of what the last forecast was off by.
    """

    def __init__(self, kernel: OutputKernel, denoiser: nn.Module) -> None:
        self.kernel, self.denoiser, self.facts = kernel, denoiser, Signature(denoiser)
        self.outputs: dict[tuple[int, int], Any] = {}  # (step, which call of it)
        self.seen: dict[int, int] = {}
        self.step: int | None = None
        self.error = 0.0

    def __call__(self, run: Callable[[], Tensor], step: int | None) -> Tensor:
        """The results of a run, float64 on the CPU. step: None: as it is."""
        self.step, self.seen = step, {}
        patch = override_(self.denoiser, self._call)
        try:
            return run().detach().cpu().double()
        finally:
            patch.remove()

    def _call(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        time = self.facts.step(self.facts.inputs(args, kwargs))
        times = self.kernel.timesteps
        now = min(range(len(times)), key=lambda i: abs(times[i] - time))
        which = self.seen[now] = self.seen.get(now, -1) + 1
        if self.step is None:
            out = original(*args, **kwargs)
            self.outputs[now, which] = map_tensors(lambda t: t.detach().clone(), out)
            return out
        if now > self.step or (now, which) not in self.outputs:
            return original(*args, **kwargs)
        kept = self.outputs[now, which]
        return map_tensors(torch.clone, kept) if now < self.step else self._forecast(kept, which)

    def _forecast(self, kept: Any, which: int) -> Any:
        """The output of the step from the ones before, as a forecast would be."""
        assert self.step is not None
        rows = [row for row in range(self.step - 1, -1, -1) if (row, which) in self.outputs][:TAPS]
        values = self.kernel.values
        square = values[rows][:, rows]
        square = square + 1e-6 * values.diagonal().mean() * torch.eye(len(rows)).double()
        weights = torch.linalg.solve(square, values[rows, self.step]).tolist()

        def combined(*taps: Tensor) -> Tensor:
            if not taps[0].is_floating_point():
                return taps[0].clone()
            pairs = zip(weights, taps, strict=True)
            return sum((w * t.float() for w, t in pairs), torch.zeros(())).to(taps[0].dtype)

        found = map_tensors(combined, *(self.outputs[row, which] for row in rows))
        given, right = next(tensors_in(found)).double(), next(tensors_in(kept)).double()
        self.error = float((given - right).square().mean().sqrt())
        return found


def _spread(steps: int) -> Sequence[int]:
    """The steps that are measured: the last two, and others evenly from the third on."""
    rest = list(range(2, steps))
    if len(rest) <= TRIALS:
        return rest
    even = torch.linspace(2, steps - 2, TRIALS - 1).round().long().tolist()
    return [*even, steps - 1]


def _filled(found: dict[int, float], steps: int) -> tuple[float, ...]:
    """A value a step: between the measured ones in proportion, beyond them the nearest."""
    known = sorted(found)
    filled: list[float] = []
    for step in range(steps):
        low = max((k for k in known if k <= step), default=known[0])
        high = min((k for k in known if k >= step), default=known[-1])
        share = 0.0 if high <= low else (step - low) / (high - low)
        filled.append(math.exp((1 - share) * math.log(found[low]) + share * math.log(found[high])))
    return tuple(filled)
