"""What records a call on a device, and does it again: CUDA graphs, and what is kept of each."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..model import map_tensors, tensors_in
from ..text import first_line
from .kernels.quantize_input import compiling
from .side_branch import STREAMS, branching

log = logging.getLogger("tenuto")

TAKEN, LEFT = 1 / 8, 1 / 4  # of a card's memory: by graphs at most; free at least, for a decoder
Replay = Callable[[], None]


class Capture(Protocol):
    """Records what `call` does on the device.

    Returns what does it again, and what `call` returned: the same tensors at every replay, with
    values from the first replay on. RuntimeError where it cannot be recorded.
    """

    def __call__(self, call: Callable[[], Any]) -> tuple[Replay, Any]: ...

    def seconds(self, run: Callable[[], Any]) -> float:
        """How long `run` takes until the device has done it."""
        ...

    def crowded(self) -> str | None:
        """Why what is recorded takes too much of the device's memory, or None."""
        ...


CaptureOn = Callable[[torch.device], Capture]


class CudaCapture:
    """By `torch.cuda.CUDAGraph` on one card, whichever the current one is.

    All graphs share a stream and a pool of memory, as they never run at once. A pool whose graphs
    are all gone cannot be used again: take another capture then. What is captured has run before,
    so that its kernels are loaded and their tiles chosen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        self.stream: Any = None
        self.beside: list[Any] = []  # streams for parts that need not wait
        self.bytes = 0  # of the pool

    def __call__(self, call: Callable[[], Any]) -> tuple[Replay, Any]:
        with torch.cuda.device(self.device):
            if self.pool is None:
                self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
                self.beside = [torch.cuda.Stream() for _ in range(STREAMS)]
            graph = torch.cuda.CUDAGraph()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            own = {"pool": self.pool, "stream": self.stream}
            earlier = sys.exc_info()[1]  # the user's own, which is being handled
            try:
                mode = "thread_local"
                with (
                    torch.cuda.graph(graph, **own, capture_error_mode=mode),
                    branching(self.beside),
                ):
                    out = call()
            except Exception as error:  # of any kind: whatever it is, the call runs as it is
                raise RuntimeError(first_line(cause_of(error, earlier))) from error
            self.bytes += max(0, torch.cuda.memory_reserved() - before)
        return functools.partial(self._replay, graph), out

    def _replay(self, graph: Any) -> None:
        with torch.cuda.device(self.device):
            graph.replay()

    def seconds(self, run: Callable[[], Any]) -> float:
        """By the clock of the host."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            return time.perf_counter() - start

    def crowded(self) -> str | None:
        """Of what is allowed of the card's memory, see `TAKEN` and `LEFT`."""
        free, whole = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        free += reserved - torch.cuda.memory_allocated(self.device) - self.bytes
        if self.bytes <= TAKEN * whole and free >= LEFT * whole:
            return None
        taken, left = (f"{x / 2**30:.1f} GiB" for x in (self.bytes, max(0, free)))
        return f"they would take {taken} of the card's memory and leave {left}"


def cause_of(error: BaseException, earlier: BaseException | None = None) -> BaseException:
    """What went wrong first: the end of a capture raises another error, "a previous error".

    earlier: what was being handled when it began, and is no part of it.
    """
    while error.__context__ is not None and error.__context__ is not earlier:
        error = error.__context__
    return error


@dataclass(eq=False)
class Captured:
    """One graph. inputs: the tensors that it reads, in order. made: by number of the cell.

    uses: how often it was replayed.
    """

    replay: Replay
    inputs: list[Tensor]
    out: Any
    made: dict[int, Any]
    uses: int = 0

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Copy the inputs of a call in, those too that are the same objects as in the last one.

        Not every writer raises a tensor's version: `.data`, NumPy and other graphs do not.
        """
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)


class Reads:
    """Functions of tensors alone as graphs, by the shapes of these: what a clock reads of a call.

    Some forty small kernels start at once. A thread that comes meanwhile does without.
    """

    def __init__(
        self, capture: CaptureOn = CudaCapture, device: str = "cuda", most: int = 8
    ) -> None:
        self.capture, self.device, self.most = functools.cache(capture), device, most
        self.known: OrderedDict[Any, Captured | None] = OrderedDict()  # None: it was seen once
        self.lock = threading.Lock()

    def __call__(self, call: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        """call(*args)."""
        if not self.lock.acquire(blocking=False):
            return call(*args)
        try:
            return self._read(call, args)
        finally:
            self.lock.release()

    def _read(self, call: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        tensors = list(tensors_in(args))
        if any(x.device.type != self.device for x in tensors) or compiling() or self.most == 0:
            return call(*args)
        shapes = tuple((x.shape, x.dtype, x.device) for x in tensors)
        lengths = tuple(len(a) for a in args if isinstance(a, list))
        key = shapes, lengths, torch.is_inference_mode_enabled()
        if key not in self.known:
            self.known[key] = None
            if len(self.known) > self.most:
                self.known.popitem(last=False)
            return call(*args)
        found = self.known[key]
        if found is None:
            if not any(self.known.values()):
                self.capture.cache_clear()
            own = map_tensors(lambda x: torch.empty_like(x).copy_(x), args)
            try:
                replay, out = self.capture(tensors[0].device)(lambda: call(*own))
            except RuntimeError as error:
                self.most = 0
                log.warning(
                    "The step of a call is read without a CUDA graph: %s.", first_line(error)
                )
                return call(*args)
            inputs = list(tensors_in(own))
            found = Captured(replay, inputs, out, {})
            self.known[key] = found
        self.known.move_to_end(key)
        found.fill(tensors)
        found.replay()
        return found.out.clone()
