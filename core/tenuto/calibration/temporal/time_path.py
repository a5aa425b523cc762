"""The time-only path of a denoiser as a finite set: its features at every calibrated step.

A feature that depends on the timestep alone has T values in a run of T steps. `TimePath` is all
time-only modules as one block, the Temporal Information Block of TFMQ-DM (arXiv 2311.16503), which
block reconstruction then takes like any other.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ModelError
from ...model import Leave, Swap, device_and_dtype, map_tensors, tensors_in, watched
from ...numerics import Format, QTensor, Scheme, covering
from ...runtime import QConv2d, QLinear, TemporalTable
from ...sampling import Call, Clock, Trajectory
from ..bank import Bank, banked, cut_out
from ..by_block import filled
from ..replay import arguments

log = logging.getLogger("tenuto")

LINKS: tuple[Callable[[Tensor], Tensor], ...] = (torch.clone, F.silu, F.gelu, F.relu, F.mish)


def _close(x: Tensor, y: Tensor) -> bool:
    """Equal but for the last bits, in which rows of one product may differ."""
    return torch.allclose(x, y, rtol=1e-4, atol=1e-6)


class TimePath(nn.Module):
    """Time-only modules as one block whose outputs are known at every calibrated step.

    names: of the modules, in execution order. bank: what each gets, one row a step (T rows).
    features: name -> its outputs, each (T, ...). singles: which return a tensor and no tuple.
    An input that is an activation of an earlier module's output is linked to it, so that an error
    there is felt here: the embedding layers of residual blocks see the time embedding.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        bank: Bank,
        features: dict[str, tuple[Tensor, ...]],
        singles: Mapping[str, bool],
        timesteps: Sequence[float],
    ) -> None:
        super().__init__()
        self.names, self.timesteps = tuple(modules), tuple(timesteps)
        self.bank, self.features, self.singles = bank, features, dict(singles)
        self.parts = nn.ModuleList(modules.values())
        self.links = self._links()

    def local(self, name: str) -> str:
        """The name inside this block of a layer of the denoiser."""
        owner = self.owner(name)
        return f"parts.{self.names.index(owner)}{name[len(owner) :]}"

    def owner(self, name: str) -> str:
        """The time-only module that holds the layer `name`; KeyError where none does."""
        for found in self.names:
            if name == found or name.startswith(f"{found}."):
                return found
        raise KeyError(name)

    def target(self) -> Tensor:
        """All features in full precision, side by side: (T, sum of their widths)."""
        found = [t.flatten(1) for name in self.names for t in self.features[name]]
        return torch.cat(found, 1)

    def forward(self, *calls: tuple[Any, Any]) -> Tensor:
        """All outputs side by side for one (args, kwargs) a module: (rows, sum of widths)."""
        return torch.cat([t.flatten(1) for out in self.run(*calls) for t in out], 1)

    def run(self, *calls: tuple[Any, Any]) -> list[list[Tensor]]:
        """The outputs of every module, in order."""
        found: list[list[Tensor]] = []
        for number, (args, kwargs) in enumerate(calls):
            if number in self.links:
                source, output, link = self.links[number]
                args, kwargs = _fed(args, kwargs, link(found[source][output]))
            found.append(list(tensors_in(self.parts[number](*args, **kwargs))))
        return found

    def _links(self) -> dict[int, tuple[int, int, Callable[[Tensor], Tensor]]]:
        """Module number -> (earlier module, its output, the function between them)."""
        args, _ = self.bank.rows(torch.arange(len(self.bank)), "cpu")
        found = {}
        for number, given in enumerate(args):
            x = next(tensors_in(given))
            for source in range(number):
                for output, y in enumerate(self.features[self.names[source]]):
                    for link in LINKS if y.shape == x.shape else ():
                        if _close(link(y.to(x.dtype)), x):
                            found.setdefault(number, (source, output, link))
        return found

    @torch.no_grad()
    def ranges(
        self, weights: Mapping[str, QTensor], forms: Mapping[str, Format]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """(scale, zero_point), fp32 (T,), of the input of every layer in `forms`: min-max.

        The inputs are a finite set, one a step: finite set calibration of TFMQ-DM. They are seen
        with the weights already quantized.
        """
        twin, row = copy.deepcopy(self), 0
        low = {n: torch.full((len(self.bank),), torch.inf) for n in weights}
        high = {n: -values for n, values in low.items()}
        for name, q in weights.items():
            layer: Any = twin.get_submodule(self.local(name))
            layer.weight.data.copy_(q.dequantize())
        layers = {self.local(name): name for name in weights}

        def note(name: str, args: Any, kwargs: Any) -> None:
            lows, highs = low[layers[name]], high[layers[name]]
            x = next(tensors_in((args, kwargs)))
            lows[row] = torch.minimum(lows[row], x.amin().cpu())
            highs[row] = torch.maximum(highs[row], x.amax().cpu())

        device, _ = device_and_dtype(twin)
        with watched(twin, layers, before=note):
            for row in range(len(self.bank)):
                args, kwargs = self.bank.rows(torch.tensor([row]), device)
                twin(*args, **kwargs)
        return {n: covering(low[n], high[n], form) for n, form in forms.items()}

    def errors(self, *given: Any) -> dict[str, Tensor]:
        """1 - cosine of each module's outputs to full precision, float64 (T,), step by step.

        Of those that `answers` has.
        """
        found: dict[str, Tensor] = {}
        for name, outputs in self.answers(*given).items():
            some = (zip(*tensors, strict=True) for tensors in (outputs, self.features[name]))
            found[name] = torch.stack(
                [_gap(_flat(a), _flat(b)) for a, b in zip(*some, strict=True)]
            )
        return found

    @torch.no_grad()
    def answers(
        self,
        weights: Mapping[str, tuple[QTensor, Scheme]],
        ranges: Mapping[str, tuple[Tensor, Tensor]],
        tables: Mapping[str, Sequence[Tensor]],
    ) -> dict[str, tuple[Tensor, ...]]:
        """Each module's outputs at every step, (T, ...) as `features`, on the CPU.

        Of the very layers and tables that `attach` puts in.
        """
        twin, clock = copy.deepcopy(self), Clock(self.timesteps)
        device, _ = device_and_dtype(twin)
        for name, rows in tables.items():
            number = self.names.index(name)
            table = TemporalTable(twin.parts[number], rows, self.singles[name], clock)
            twin.parts[number] = table
        for name, (q, scheme) in weights.items():
            layer: Any = twin.get_submodule(self.local(name))
            kind: Any = QConv2d if isinstance(layer, nn.Conv2d) else QLinear
            new = kind(layer, q, scheme, clock, ranges.get(name), True)
            Swap(twin, self.local(name), new)
        found: dict[str, list[list[Tensor]]] = {name: [] for name in self.names}
        for row, timestep in enumerate(self.timesteps):
            clock.tick(timestep, (0,), device)
            args, kwargs = self.bank.rows(torch.tensor([row]), device)
            for name, out in zip(self.names, twin.run(*args, **kwargs), strict=True):
                found[name].append([t.detach()[0].cpu() for t in out])
        return {
            name: tuple(torch.stack(column) for column in zip(*steps, strict=True))
            for name, steps in found.items()
        }


def _fed(args: Any, kwargs: Any, x: Tensor) -> tuple[Any, Any]:
    """The arguments of a call with `x` as their first tensor."""
    first = next(tensors_in((args, kwargs)))
    return map_tensors(lambda t: x if t is first else t, (args, kwargs))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


def _gap(x: Tensor, y: Tensor) -> Tensor:
    """1 - cosine of two vectors, by the distance of their directions: exact where it is small."""
    x, y = (v / v.norm().clamp_min(1e-30) for v in (x, y))
    return (x - y).square().sum() / 2


@torch.no_grad()
def time_path(
    denoiser: nn.Module, names: Sequence[str], trajectory: Trajectory, device: Any
) -> TimePath:
    """The time path of `denoiser`: one recorded call a step, up to the last of its modules.

    A module whose outputs are no tensors with the rows of its input, or not the same in every row,
    is left out, with a word in the log.
    """
    calls = one_a_step(trajectory)
    visits = [_visit(denoiser, names, call, device) for call in calls]
    kept = [n for n in visits[0] if all(n in v and _is_feature(*v[n]) for v in visits)]
    for name in names:
        if name not in kept:
            log.warning("%s is no feature of the timestep alone and is not maintained", name)
    found = [
        cut_out((tuple(_first_row(*v[n][:2]) for n in kept), {}), call.row)
        for v, call in zip(visits, calls, strict=True)
    ]
    bank = banked("the time path", found) if kept else Bank(((), {}), {}, {}, torch.zeros(0))
    if kept and len(bank) != len(calls):
        raise ModelError("The time path is not called alike at every step.")
    features: dict[str, tuple[Tensor, ...]] = {}
    for name in kept:
        steps = [[t[0].float().cpu() for t in tensors_in(v[name][2])] for v in visits]
        features[name] = tuple(torch.stack(column) for column in zip(*steps, strict=True))
    singles = {n: isinstance(visits[0][n][2], Tensor) for n in kept}
    modules = {n: filled(denoiser, n) for n in kept}
    return TimePath(modules, bank, features, singles, trajectory.timesteps)


def one_a_step(trajectory: Trajectory) -> list[Call]:
    """A recorded call of every calibrated step, of the first run that has it."""
    found: dict[int, Call] = {}
    for call in trajectory.calls:
        known = found.setdefault(call.row, call)
        if known.timestep != trajectory.timesteps[call.row] == call.timestep:
            found[call.row] = call
    return [found[row] for row in sorted(found)]


def _visit(
    denoiser: nn.Module, names: Sequence[str], call: Call, device: Any
) -> dict[str, tuple[Any, Any, Any]]:
    """(args, kwargs, output) of every module's first call, in the order in which they come."""
    found: dict[str, tuple[Any, Any, Any]] = {}

    def note(name: str, args: Any, kwargs: Any, out: Any) -> None:
        found.setdefault(name, (tuple(args), dict(kwargs), out))
        if len(found) == len(names):
            raise Leave

    with watched(denoiser, names, after=note), suppress(Leave):
        denoiser(**arguments(denoiser, call, device))
    return found


def _is_feature(args: Any, kwargs: Any, out: Any) -> bool:
    """Whether the outputs are tensors with the input's rows, and the same in every row.

    What hands them out as a type of its own, which a table could not return, is none.
    """
    first = next(tensors_in((args, kwargs)), None)
    found = [out] if isinstance(out, Tensor) else out
    if first is None or not first.ndim or type(found) not in (list, tuple) or not found:
        return False
    return all(
        isinstance(t, Tensor)
        and t.ndim > 1
        and len(t) == len(first)
        and _close(t, t[:1].expand_as(t))
        for t in found
    )


def _first_row(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call, of the first row alone."""
    batch = len(next(tensors_in((args, kwargs))))

    def cut(x: Tensor) -> Tensor:
        return (x[:1] if x.ndim and len(x) == batch else x).clone()

    return map_tensors(cut, (args, kwargs))
