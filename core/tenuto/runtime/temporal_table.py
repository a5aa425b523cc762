"""`TemporalTable`: a time-only module replaced by its values at every calibrated step.

The cache-based maintenance of Temporal Feature Matters (arXiv 2407.19547): what depends on the
timestep alone is computed once, in full precision, and the module leaves the quantized model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Replacement, device_and_dtype, outside_graphs, tensors_in
from ..sampling import Clock

log = logging.getLogger("tenuto")

FIRST = 16  # rows beyond the calibrated ones for which there is room at first


class TemporalTable(Replacement):
    """In place of a time-only module: its outputs, read at the clock's index.

    rows: one tensor (T, ...) per output, without the batch. single: whether the module returns a
    tensor, else a tuple. At a timestep that was not calibrated, or where the rows of a batch are at
    different ones, the original computes: any number of steps works. Models look at the weights of
    such a module, or of one inside it, for the dtype to call it in: there are empty ones.
    parked: the original's weights are out of the way (see `Parked`). What it answers at a timestep
    is then kept, for that they are brought in once.
    """

    def __init__(
        self, module: nn.Module, rows: Sequence[Tensor], single: bool, clock: Clock
    ) -> None:
        super().__init__()
        device, self.dtype = device_and_dtype(module)
        self.clock, self.single, self.count = clock, single, len(rows)
        self.layer = isinstance(module, nn.Linear)
        empty = torch.empty(0, dtype=self.dtype, device=device)
        self.weight: Tensor
        self.register_buffer("weight", empty)
        for number, values in enumerate(rows):
            self.register_buffer(f"rows_{number}", values.to(device))
        self._original: tuple[nn.Module, ...] = (module,)  # no child: its weights are out
        self._hollow: tuple[nn.Module, ...] = (_hollow(module),)
        self.parked = False
        self._have: tuple[int, set[int]] = -1, set()  # rows that are kept, in which generation
        self.train(module.training)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The empty weight, which is no state: offloading would look for it in a state dict."""
        yield nn.Parameter(self.weight, requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        """What the original has inside, empty."""
        inside = self.__dict__.get("_hollow")
        if inside is not None and name in inside[0]._modules:
            return inside[0]._modules[name]
        return super().__getattr__(name)

    def __getitem__(self, place: int) -> nn.Module:
        """What a `Sequential` has there, empty."""
        return getattr(self, str(place))

    def rows(self) -> list[Tensor]:
        """The tables, each (T, ...)."""
        return [self.get_buffer(f"rows_{number}") for number in range(self.count)]

    def release(self) -> None:
        """Forget the original; a timestep that was not calibrated then takes the nearest row."""
        self._original = ()
        self.park(False)

    def park(self, away: bool) -> None:
        """Whether the weights of the original are out of the way from now on."""
        self.clock.further.tables += int(away) - int(self.parked)
        self.parked = away
        self._forget()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.clock.exact:
            return self._read(self.rows(), self.clock.index, args, kwargs)
        if not self._original:
            _tell_nearest()
            return self._read(self.rows(), self.clock.index, args, kwargs)
        if not self.parked:
            return self._computed(*args, **kwargs)
        if self.clock.further.missing or not self.clock.further.tables:
            return self._filled(*args, **kwargs)
        return self._read(self._further(), self.clock.further.row, args, kwargs)

    def _read(self, rows: Sequence[Tensor], index: Tensor, args: Any, kwargs: Any) -> Any:
        x = next(tensors_in((args, kwargs)))
        found = tuple(self._row(values, index, len(x)) for values in rows)
        if self.layer and x.ndim > found[0].ndim:  # a host gives it a row a token: (B, 1, K)
            inner = (1,) * (x.ndim - found[0].ndim)
            shape = (*x.shape[:-1], found[0].shape[-1])
            return found[0].reshape(len(x), *inner, -1).expand(shape).contiguous()
        return found[0] if self.single else found

    def _row(self, values: Tensor, index: Tensor, batch: int) -> Tensor:
        index = index.to(values.device).expand(batch)  # a row each: it may be written to
        return values.index_select(0, index).to(self.dtype)

    def _computed(self, *args: Any, **kwargs: Any) -> Any:
        (module,) = self._original
        device, dtype = self.rows()[0].device, self.dtype
        found = device_and_dtype(module)
        if found == (device, dtype):
            return module(*args, **kwargs)
        if not self.parked:
            return module.to(device, dtype)(*args, **kwargs)
        cast = None if found[1] is dtype else dtype
        state = {
            name: value.to(device, cast if value.is_floating_point() else None)
            for name, value in (*module.named_parameters(), *module.named_buffers())
        }
        return torch.func.functional_call(module, state, args, kwargs)

    # --- timesteps that were not calibrated, while the weights are out of the way ---

    @outside_graphs
    def _filled(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs at this timestep: those that are kept, else computed and kept."""
        further = self.clock.further
        if further.place is None or not further.tables:
            return self._computed(*args, **kwargs)
        if self._have[0] != further.generation:
            self._have = further.generation, set()
        if further.place in self._have[1]:
            return self._read(self._further(), further.row, args, kwargs)
        out = self._computed(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():  # or no call outside could write there
            for number, part in enumerate([out] if self.single else out):
                self._keep(number, further.place, part)
        self._have[1].add(further.place)
        further.fill(further.place)
        return out

    def _further(self) -> list[Tensor]:
        return [self.get_buffer(f"further_{number}") for number in range(self.count)]

    def _keep(self, number: int, place: int, out: Tensor) -> None:
        """The first row of `out` as row `place` of the kept outputs."""
        name, size = f"further_{number}", self.rows()[number].shape[1:]
        kept = self._buffers.get(name)
        if kept is None or place >= len(kept) or kept.dtype is not out.dtype:
            room = FIRST if kept is None else len(kept)
            while room <= place:
                room *= 2
            grown = out.new_zeros(room, *size)
            if kept is not None:
                grown[: len(kept)] = kept
            self.register_buffer(name, grown, persistent=False)
            kept = grown
        kept[place].copy_(out.reshape(-1, *size)[0])

    def _forget(self) -> None:
        """Drop the kept outputs, here and, with those of the other tables, in the clock."""
        for number in range(self.count):
            self._buffers.pop(f"further_{number}", None)
        self._have = -1, set()
        self.clock.further.forget()

    def _apply(self, fn: Any, recurse: bool = True) -> TemporalTable:
        if self.parked:
            self._forget()
        kept = self.rows()
        super()._apply(fn, recurse)
        self._hollow[0]._apply(fn)
        for number, values in enumerate(kept):  # a cast of the model must not round the table
            name = f"rows_{number}"
            setattr(self, name, values.to(self.get_buffer(name).device))
        device = kept[0].device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self


class _Hollow(nn.ModuleList):
    """Modules by their names, with empty weights."""


def _hollow(module: nn.Module) -> _Hollow:
    """The modules inside `module`, at any depth."""
    made = _Hollow()
    for name, child in module.named_children():
        made.add_module(name, _hollow(child))
    for name, value in module.named_parameters(recurse=False):
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        made.register_buffer(name, empty, persistent=False)
    return made


@cache
def _tell_nearest() -> None:
    """Once a process."""
    log.warning(
        "A timestep that was not calibrated takes the nearest row: the originals were released."
    )
