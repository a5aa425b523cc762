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

from ..model import Replacement, device_and_dtype, tensors_in
from ..sampling import Clock

log = logging.getLogger("tenuto")


class TemporalTable(Replacement):
    """In place of a time-only module: its outputs, read at the clock's index.

    rows: one tensor (T, ...) per output, without the batch. single: whether the module returns a
    tensor, else a tuple. At a timestep that was not calibrated, or where the rows of a batch are at
    different ones, the original computes: any number of steps works. Models look at the weights of
    such a module for the dtype to call it in: there is an empty one.
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
        self.train(module.training)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The empty weight, which is no state: offloading would look for it in a state dict."""
        yield nn.Parameter(self.weight, requires_grad=False)

    def rows(self) -> list[Tensor]:
        """The tables, each (T, ...)."""
        return [self.get_buffer(f"rows_{number}") for number in range(self.count)]

    def release(self) -> None:
        """Forget the original; a timestep that was not calibrated then takes the nearest row."""
        self._original = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.clock.exact:
            if self._original:
                return self._computed(*args, **kwargs)
            _tell_nearest()
        x = next(tensors_in((args, kwargs)))
        found = tuple(self._read(values, len(x)) for values in self.rows())
        if self.layer and x.ndim > found[0].ndim:  # a host gives it a row a token: (B, 1, K)
            inner = (1,) * (x.ndim - found[0].ndim)
            shape = (*x.shape[:-1], found[0].shape[-1])
            return found[0].reshape(len(x), *inner, -1).expand(shape).contiguous()
        return found[0] if self.single else found

    def _read(self, values: Tensor, batch: int) -> Tensor:
        index = self.clock.index.to(values.device).expand(batch)  # a row each: it may be written to
        return values.index_select(0, index).to(self.dtype)

    def _computed(self, *args: Any, **kwargs: Any) -> Any:
        (module,) = self._original
        here = self.rows()[0].device, self.dtype
        if device_and_dtype(module) != here:
            module.to(*here)
        return module(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> TemporalTable:
        kept = self.rows()
        super()._apply(fn, recurse)
        for number, values in enumerate(kept):  # a cast of the model must not round the table
            name = f"rows_{number}"
            setattr(self, name, values.to(self.get_buffer(name).device))
        device = kept[0].device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self


@cache
def _tell_nearest() -> None:
    """Once a process."""
    log.warning(
        "A timestep that was not calibrated takes the nearest row: the originals were released."
    )
