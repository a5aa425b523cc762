"""How much an error of each temporal feature is worth: what it does to the final sample.

A feature of every calibrated step is disturbed by itself, on a recorded call, and what the
denoiser's output changes by is weighted by what an error in that step's output does to the final
sample (`OutputKernel.gains`; alike where a trajectory has no kernel). To first order an error e of
that feature then costs `worth * |e|^2`, and errors of several features and steps add up: they are
independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...model import Swap, frozen, tensors_in
from ...progress import Progress
from ...runtime import TemporalTable
from ...sampling import Call, Clock, Trajectory
from ..replay import arguments
from .time_path import TimePath, one_a_step

CALLS = 400  # of the denoiser, about: with more features fewer steps are measured
FEWEST = 3  # steps
SIZE = 0.01  # of a disturbance, of the feature's root mean square
UNSEEN = 0.1  # of a squared error that only features see which are tables
NOTE = "what features are worth"

Worth = dict[str, tuple[Tensor, ...]]


@torch.no_grad()
def worth(
    model: nn.Module,
    path: TimePath,
    trajectory: Trajectory,
    device: Any,
    computing: Collection[str] = (),
    on_progress: Progress | None = None,
) -> Worth:
    """Name -> of each of its outputs, float64 (T,): squared error at the end over that of it.

    model: what was recorded, still in full precision. computing: modules that may go on computing,
    so that an error of those before them is felt in them; all others are as tables. An error that
    nothing would feel then is measured with all that computes from it, and counts `UNSEEN` of that:
    a module with a LoRA is no table.
    """
    calls = {call.row: call for call in one_a_step(trajectory)}
    places = [(name, i) for name in path.names for i in range(len(path.features[name]))]
    steps = _spread(len(path.timesteps), max(FEWEST, CALLS // max(1, len(places))))
    measured = {place: dict[int, float]() for place in places}
    draw = torch.Generator().manual_seed(0)
    with ExitStack() as stack, frozen(model):
        trial = _Trial(model, path, device, computing, stack)
        for done, row in enumerate(steps):
            plain = trial(calls[row])
            for number, (name, output) in enumerate(places):
                if on_progress is not None:
                    on_progress(done * len(places) + number, len(steps) * len(places), NOTE)
                noise = torch.randn(path.features[name][output][row].shape, generator=draw)
                found = trial.disturbed(calls[row], plain, name, output, noise)
                if not found:
                    with trial.computed(name):
                        computed = trial(calls[row])
                        found = trial.disturbed(calls[row], computed, name, output, noise)
                    found *= UNSEEN
                measured[name, output][row] = found
    gains = _gains(trajectory, len(path.timesteps))
    return {
        name: tuple(
            _filled(measured[name, i], len(path.timesteps)) * gains.square()
            for i in range(len(path.features[name]))
        )
        for name in path.names
    }


class _Trial:
    """Calls of a model whose time-only modules are tables in full precision."""

    def __init__(
        self,
        model: nn.Module,
        path: TimePath,
        device: Any,
        computing: Collection[str],
        stack: ExitStack,
    ) -> None:
        self.model, self.path, self.device = model, path, device
        self.clock = Clock(path.timesteps)
        self.tables = {
            name: TemporalTable(
                part, [t.clone() for t in path.features[name]], path.singles[name], self.clock
            )
            for name, part in zip(path.names, path.parts, strict=True)
        }
        self.computing = set(computing)
        for name in self.tables.keys() - self.computing:
            stack.callback(Swap(model, name, self.tables[name]).remove)
        self.fed = dict[str, list[str]]()
        for number, (source, _, _) in path.links.items():
            self.fed.setdefault(path.names[source], []).append(path.names[number])

    def __call__(self, call: Call) -> Tensor:
        """All that the denoiser returns, float64, a row for each of the call's."""
        self.clock.tick(self.path.timesteps[call.row], (0,), self.device)
        out = self.model(**arguments(self.model, call, self.device))
        found = [t.double() for t in tensors_in(out) if t.is_floating_point()]
        return torch.cat([t.flatten(1) if t.ndim > 1 else t.reshape(1, -1) for t in found], 1)

    @contextmanager
    def computed(self, name: str) -> Iterator[None]:
        """Within, what is fed by the module `name` computes."""
        swaps = []
        for fed in self.fed.get(name, ()):
            if fed not in self.computing:
                number = self.path.names.index(fed)
                swaps.append(Swap(self.model, fed, self.path.parts[number]))
        try:
            yield
        finally:
            for swap in swaps:
                swap.remove()

    def disturbed(self, call: Call, plain: Tensor, name: str, output: int, noise: Tensor) -> float:
        """The squared change of the output of `call` over that of one feature; a mean of rows."""
        table, swap = self.tables[name], None
        if name in self.computing:
            swap = Swap(self.model, name, table)
        rows = table.rows()[output]
        kept = rows[call.row].clone()
        size = SIZE * float(kept.square().mean().sqrt()) or SIZE
        try:
            rows[call.row] += size * noise.to(rows)
            change = self(call) - plain
        finally:
            given = rows[call.row] - kept
            rows[call.row] = kept
            if swap is not None:
                swap.remove()
        moved = float(change.square().sum()) / len(change)
        return moved / float(given.double().square().sum())


def _gains(trajectory: Trajectory, steps: int) -> Tensor:
    """What an error of 1 in each step's output moves the final sample by, float64 (T,)."""
    kernel = trajectory.kernel
    if kernel is None:
        return torch.ones(steps, dtype=torch.float64)
    return kernel.at(trajectory.timesteps).gains()


def _spread(steps: int, most: int) -> Sequence[int]:
    """At most so many of the steps, evenly, the first and the last among them."""
    if steps <= most:
        return range(steps)
    return sorted(set(torch.linspace(0, steps - 1, most).round().long().tolist()))


def _filled(found: dict[int, float], steps: int) -> Tensor:
    """A value a step: between the measured ones in proportion. Nothing where all are nothing."""
    known, values = sorted(found), torch.zeros(steps, dtype=torch.float64)
    least = min((v for v in found.values() if v > 0), default=0.0)
    for step in range(steps if least else 0):
        low = max(k for k in known if k <= step)
        high = min(k for k in known if k >= step)
        share = 0.0 if high == low else (step - low) / (high - low)
        logs = (math.log(max(found[k], least)) for k in (low, high))
        values[step] = math.exp((1 - share) * next(logs) + share * next(logs))
    return values
