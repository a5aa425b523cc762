"""`Graphs`: a denoiser's calls as CUDA graphs, one for every pattern of a step, replayed.

A graph starts all kernels of a call at once, where a model in eager mode waits for Python. What a
call computes depends on the shapes of its inputs, on what is reused, and on the adapters that are
on: for each such case the second call is captured, and later ones copy their inputs into the
memory that the graph reads and replay it. Prompts, seeds, steps and guidance are such inputs.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..caching import CachedBranch
from ..model import map_leaves, map_tensors, tensors_in
from .kernels.quantize_input import compiling
from .weights_in_place import InPlaceWeights

log = logging.getLogger("tenuto")

MOST = 16  # graphs of one denoiser: each keeps its own outputs
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
Replay = Callable[[], None]


class Capture(Protocol):
    """Records what `call` does on the device.

    Returns what does it again, and what `call` returned: the same tensors at every replay, with
    values from the first replay on. RuntimeError where it cannot be recorded.
    """

    def __call__(self, call: Callable[[], Any]) -> tuple[Replay, Any]: ...


class CudaCapture:
    """By `torch.cuda.CUDAGraph`; all graphs share one pool of memory, as they never run at once."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, call: Callable[[], Any]) -> tuple[Replay, Any]:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = call()
        return graph.replay, out


@dataclass(eq=False)
class Captured:
    """One graph. inputs: the tensors that it reads, in order. made: by number of the cell."""

    replay: Replay
    inputs: list[Tensor]
    out: Any
    made: dict[int, Any]
    seen: list[tuple[Any, int]]

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Copy the inputs of a call in; a tensor that is the same as in the last call is there."""
        for number, (own, given) in enumerate(zip(self.inputs, tensors, strict=True)):
            version = -1 if given.is_inference() else given._version
            known, before = self.seen[number]
            if known is not None and known() is given and before == version >= 0:
                continue
            own.copy_(given)
            self.seen[number] = weakref.ref(given), version


class Reads:
    """Functions of tensors alone as graphs, by the shapes of these: what a clock reads of a call.

    Some forty small kernels start at once. What comes out is written over by the next call.
    """

    def __init__(self, capture: Capture | None = None, device: str = "cuda", most: int = 8) -> None:
        self.capture, self.device, self.most = capture or CudaCapture(), device, most
        self.known: OrderedDict[Any, Captured | None] = OrderedDict()  # None: it was seen once

    def __call__(self, call: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        """call(*args)."""
        tensors = list(tensors_in(args))
        if any(x.device.type != self.device for x in tensors) or compiling() or self.most == 0:
            return call(*args)
        shapes = tuple((x.shape, x.dtype) for x in tensors)
        lengths = tuple(len(a) for a in args if isinstance(a, list))
        key = shapes, lengths, torch.is_inference_mode_enabled()
        if key not in self.known:
            self.known[key] = None
            if len(self.known) > self.most:
                self.known.popitem(last=False)
            return call(*args)
        found = self.known[key]
        if found is None:
            own = map_tensors(lambda x: torch.empty_like(x).copy_(x), args)
            try:
                replay, out = self.capture(lambda: call(*own))
            except RuntimeError as error:
                self.most = 0
                log.warning("The step of a call is read without a CUDA graph: %s.", first(error))
                return call(*args)
            inputs = list(tensors_in(own))
            found = Captured(replay, inputs, out, {}, [(None, -1)] * len(inputs))
            self.known[key] = found
        self.known.move_to_end(key)
        found.fill(tensors)
        found.replay()
        return found.out


def first(error: Exception) -> str:
    """The first line of what went wrong."""
    return str(error).strip().partition("\n")[0][:120]


class Graphs:
    """Runs the calls of `denoiser`: captured where that can be, else as they are.

    cells: what reuses outputs inside the call. capture: what records. most: how many graphs are
    kept, the one used last the longest. device: of the calls that are captured. warm: how many
    calls of a case run before it is captured.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        cells: Sequence[CachedBranch] = (),
        *,
        capture: Capture | None = None,
        most: int = MOST,
        device: str = "cuda",
        warm: int = 1,
    ) -> None:
        self.denoiser, self.cells, self.device = denoiser, list(cells), device
        self.capture, self.most, self.warm = capture or CudaCapture(), most, warm
        self.known: OrderedDict[Any, Captured] = OrderedDict()
        self.calls: dict[Any, int] = {}
        self.reason: str | None = None  # why none is made any more
        self.weights = InPlaceWeights(denoiser)
        self.evicted = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        import copy

        cells = copy.deepcopy(self.cells, memo)
        kept = {"most": self.most, "device": self.device, "warm": self.warm}
        capture = self.capture if not isinstance(self.capture, CudaCapture) else None
        return Graphs(copy.deepcopy(self.denoiser, memo), cells, capture=capture, **kept)

    def case(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call must share with an earlier one to be its graph; None: it runs as it is."""
        if self.reason is not None or torch.is_grad_enabled() or compiling():
            return None
        parts: list[Any] = []
        strange: list[str] = []

        def leaf(value: Any, name: str) -> Any:
            if isinstance(value, Tensor):
                parts.append((name, value.shape, value.dtype, value.device))
                if value.device.type != self.device and value.ndim > 1:
                    strange.append(f"the call has a tensor on the {value.device.type.upper()}")
            elif isinstance(value, PLAIN):
                parts.append((name, type(value), value))
            else:
                strange.append(f"the call has a {type(value).__name__}")
            return value

        map_leaves(leaf, (args, kwargs))
        if not any(x.device.type == self.device for x in tensors_in((args, kwargs))):
            return None  # the model is elsewhere
        if strange or self.weights.hooked():
            return self.off(strange[0] if strange else "hooks of another library move its weights")
        if self.device == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        autocast = torch.is_autocast_enabled()
        return (*parts, self.weights.state(), torch.is_inference_mode_enabled(), autocast)

    def run(self, case: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`call` on these arguments, or the graph of it; the cells have what they reuse."""
        key = case, tuple(map(_form, (cell.given for cell in self.cells)))
        found = self.known.get(key)
        if found is not None:
            self.known.move_to_end(key)
            return self._replayed(found, args, kwargs)
        count = self.calls[key] = self.calls.get(key, 0) + 1
        if count <= self.warm or self.evicted > 4 * self.most:
            if len(self.calls) > 8 * self.most:
                self.calls.clear()
            return call(*args, **kwargs)
        try:
            found = self._captured(call, args, kwargs)
        except RuntimeError as error:
            self.off(f"it cannot be captured ({first(error)})")
            return call(*args, **kwargs)
        self.known[key] = found
        if len(self.known) > self.most:
            self.known.popitem(last=False)
            self.evicted += 1
        return self._replayed(found, args, kwargs)

    def forget(self) -> None:
        """Drop every graph: their memory is free."""
        self.known.clear()
        self.calls.clear()

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return list(tensors_in((args, kwargs, [cell.given for cell in self.cells])))

    def _captured(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
        """The call, recorded on tensors of its own."""
        given = [cell.given for cell in self.cells]
        own: list[Tensor] = []
        there = next(x.device for x in tensors_in((args, kwargs)) if x.device.type == self.device)

        def twin(x: Tensor) -> Tensor:  # on the device, a timestep of the CPU too
            own.append(torch.empty_like(x, device=there).copy_(x))
            return own[-1]

        own_args, own_kwargs, own_given = map_tensors(twin, (args, kwargs, given))
        try:
            for cell, value in zip(self.cells, own_given, strict=True):
                cell.given, cell.made = value, None
            replay, out = self.capture(lambda: call(*own_args, **own_kwargs))
            made = {n: c.made for n, c in enumerate(self.cells) if c.made is not None}
        finally:
            for cell, value in zip(self.cells, given, strict=True):
                cell.given, cell.made = value, None
        return Captured(replay, own, out, made, [(None, -1)] * len(own))

    def _replayed(self, graph: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graph.fill(self._tensors(args, kwargs))
        graph.replay()
        for number, made in graph.made.items():
            self.cells[number].made = made  # whoever keeps it copies it
        return map_tensors(Tensor.clone, graph.out)  # the next replay writes over it

    def off(self, reason: str) -> None:
        """Make no graph from now on, and say so once."""
        self.reason = reason
        self.forget()
        log.warning("%s runs without CUDA graphs: %s.", type(self.denoiser).__name__, reason)


def _form(given: Any) -> Any:
    """The shapes of what is reused; None: nothing is."""
    return None if given is None else tuple((x.shape, x.dtype) for x in tensors_in(given))
