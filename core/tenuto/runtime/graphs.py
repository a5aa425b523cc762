"""`Graphs`: a denoiser's calls as CUDA graphs, one for every pattern of a step, replayed.

A graph starts all kernels of a call at once, where a model in eager mode waits for Python. What a
call computes depends on the shapes of its inputs, on what is reused, and on the weights and
adapters that are there: for each such case the second call is captured, and later ones copy their
inputs into the memory that the graph reads and replay it. Prompts, seeds, steps and guidance are
such inputs.
"""

from __future__ import annotations

import functools
import logging
import statistics
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..caching import CachedBranch
from ..model import map_leaves, map_tensors, tensors_in
from ..text import first_line
from .captures import Capture, Captured, CaptureOn, CudaCapture
from .graph_cases import about, autocast, casts_uncached, other_stream, switches
from .kernels.quantize_input import compiling
from .weights_in_place import PLAIN, InPlaceWeights

log = logging.getLogger("tenuto")

MOST = 16  # graphs of one denoiser: each keeps its own outputs
GAIN = 0.98  # of the time of a call as it is: what its graph must stay below to be kept
TURNS = 3  # of both, timed one after the other
USES = 5  # replays: fewer do not pay for a capture
LONG = 0.3  # seconds of a call: starting its kernels is a small part of them, and trials take time


class Graphs:
    """Runs the calls of `denoiser`: captured where that can be, else as they are.

    cells: what reuses outputs inside the call. capture: what records on a device. most: how many
    graphs are kept, the one used last the longest. device: of the calls that are captured. warm:
    how many calls of a case run before it is captured. choose: keep a graph only where it is faster
    than the call, which takes less than `LONG`, while the card has the memory, and where no
    processor of another library could miss a call.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        cells: Sequence[CachedBranch] = (),
        *,
        capture: CaptureOn = CudaCapture,
        most: int = MOST,
        device: str = "cuda",
        warm: int = 1,
        choose: bool = False,
    ) -> None:
        self.denoiser, self.cells, self.device = denoiser, list(cells), device
        self.capture, self.most, self.warm = functools.cache(capture), most, warm
        self.choose = choose
        self.known: OrderedDict[Any, Captured] = OrderedDict()
        self.gains: dict[Any, bool] = {}  # by about how much is computed: if a graph is faster
        self.short: dict[Any, bool] = {}  # by the form of a call: whether it does not take long
        self.calls: dict[Any, int] = {}
        self.reason: str | None = None  # why none is made now
        self.final = False  # nor later
        self.weights = InPlaceWeights(denoiser, device, strict=choose)
        self.lock = threading.Lock()
        self.evicted = 0  # in a row, of those that had hardly been replayed

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        import copy

        cells = copy.deepcopy(self.cells, memo)
        kept = {"most": self.most, "device": self.device, "warm": self.warm, "choose": self.choose}
        capture = self.capture.__wrapped__
        made = Graphs(copy.deepcopy(self.denoiser, memo), cells, capture=capture, **kept)
        made.reason, made.final = self.reason, self.final
        return made

    def case(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call must share with an earlier one to be its graph; None: it runs as it is."""
        if self.final or torch.is_grad_enabled() or compiling():
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
            if self.known:
                self.forget()  # the model is elsewhere: its memory is for others
            return None
        if strange:
            return self.off(strange[0])
        seen = torch._C._len_torch_dispatch_stack() or nn.modules.module._has_any_global_hook()
        if seen or (self.device == "cuda" and other_stream()):
            return None  # somebody counts, traces or captures what is inside
        modes = torch.is_inference_mode_enabled(), autocast(self.device), switches()
        return (*parts, *modes)

    def run(self, case: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`call` on these arguments, or the graph of it; the cells have what they reuse.

        A graph reads and writes the same memory at every replay: a thread that comes meanwhile has
        its call as it is.
        """
        if not self.lock.acquire(blocking=False):
            return call(*args, **kwargs)
        try:
            return self._run(case, call, args, kwargs)
        finally:
            self.lock.release()

    def _run(self, case: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reused = tuple(map(_form, (cell.given for cell in self.cells)))
        key = case, reused, self.weights.latest()
        found = self.known.get(key)
        if found is not None:
            self._launch(found, args, kwargs)
            if self.weights.same(placed=True):  # asked while the device works
                self.known.move_to_end(key)
                return self._answer(found)
        key = case, reused, self.weights.state()
        if self.weights.filling:
            return call(*args, **kwargs)
        if self._refused() or not (key in self.known or self._take(key, call, args, kwargs)):
            if self.reason is not None or self._gains_nothing(key[0]):
                return call(*args, **kwargs)
            with casts_uncached(self.device):  # as it will be captured: nothing is compiled anew
                return self._as_it_is(key, call, args, kwargs)
        self.known.move_to_end(key)
        self._launch(self.known[key], args, kwargs)
        return self._answer(self.known[key])

    def forget(self) -> None:
        """Drop every graph: their memory is free."""
        self.known.clear()
        self.calls.clear()
        self.gains.clear()
        self.short.clear()
        self.weights.forget()

    def _refused(self) -> bool:
        """Whether the model as it is now must not be captured; what is said of it is said once."""
        if self.weights.restless:
            self.off("something inside the model changes from call to call")
        elif self.weights.refusal != self.reason:
            self.reason = self.weights.refusal
            if self.reason is not None:
                self.known.clear()
                self._say(self.reason)
        return self.reason is not None

    def _take(self, key: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Capture a case that has run often enough; whether it is known from now on."""
        count = self.calls[key] = self.calls.get(key, 0) + 1
        if len(self.calls) > 8 * self.most:
            self.calls.clear()
        size = about(key[0])
        if count <= self.warm or self._gains_nothing(key[0]) or self._to_be_timed(key):
            return False
        try:
            found = self._captured(call, args, kwargs, self.choose and size not in self.gains)
        except RuntimeError as error:
            self.off(f"it cannot be captured ({first_line(error)})")
            return False
        if len(self.gains) > 8 * self.most:
            self.gains.clear()
        self.gains[size] = found is not None
        return found is not None and self._kept(key, found)

    def _gains_nothing(self, form: Any) -> bool:
        """Whether a call of this form takes long, or a graph of about its size was no faster."""
        return self.short.get(form) is False or self.gains.get(about(form)) is False

    def _to_be_timed(self, key: Any) -> bool:
        """Whether the next call of a case shows if its form takes long: it has run before."""
        return self.choose and key[0] not in self.short and self.calls.get(key, 0) > self.warm

    def _as_it_is(self, key: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call without a graph; timed, where that decides whether there will be one."""
        if not self._to_be_timed(key):
            return call(*args, **kwargs)
        out: list[Any] = []
        capture = self.capture(self._device((args, kwargs)))
        seconds = capture.seconds(lambda: out.append(call(*args, **kwargs)))
        if len(self.short) > 8 * self.most:
            self.short.clear()
        self.short[key[0]] = seconds <= LONG
        if seconds > LONG:
            kind = type(self.denoiser).__name__
            log.info("%s runs without CUDA graphs: a call takes %.1f s.", kind, seconds)
        return out[0]

    def _kept(self, key: Any, found: Captured) -> bool:
        """Whether there is room for one more graph; the one used longest ago may go for it."""
        self.known[key] = found
        if len(self.known) > self.most:
            _, gone = self.known.popitem(last=False)
            self.evicted = self.evicted + 1 if gone.uses < USES else 0
        there = self._device(found.inputs)
        crowded = self.capture(there).crowded() if self.choose else None
        if crowded is not None:
            self.off(crowded)
        elif self.evicted > 4 * self.most:
            self.off("its calls are of more kinds than graphs are kept")
        return not self.final

    def _device(self, tensors: Any) -> torch.device:
        """Where a call with these computes."""
        return next(x.device for x in tensors_in(tensors) if x.device.type == self.device)

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return list(tensors_in((args, kwargs, [cell.given for cell in self.cells])))

    def _captured(
        self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], timed: bool
    ) -> Captured | None:
        """The call, recorded on tensors of its own; None: it is timed, and gains nothing."""
        given = [cell.given for cell in self.cells]
        own: list[Tensor] = []
        if not self.known:
            self.capture.cache_clear()
        there = self._device((args, kwargs))
        capture = self.capture(there)

        def twin(x: Tensor) -> Tensor:  # on the device, a timestep of the CPU too
            own.append(torch.empty_like(x, device=there).copy_(x))
            return own[-1]

        own_args, own_kwargs, own_given = map_tensors(twin, (args, kwargs, given))

        def again() -> Any:
            return call(*own_args, **own_kwargs)

        try:
            for cell, value in zip(self.cells, own_given, strict=True):
                cell.given, cell.made = value, None
            with casts_uncached(self.device):
                if "torch._dynamo" in sys.modules:
                    again()  # compiled code goes by strides and kinds of tensors: not in a capture
                    for mine, x in zip(own, self._tensors(args, kwargs), strict=True):
                        mine.copy_(x)  # written anew: nothing that was made of it is known
                for cell in self.cells:
                    cell.made = None
                replay, out = capture(again)
            made = {n: c.made for n, c in enumerate(self.cells) if c.made is not None}
            slow = timed and not _gains(capture, replay, again)
        finally:
            for cell, value in zip(self.cells, given, strict=True):
                cell.given, cell.made = value, None
        return None if slow else Captured(replay, own, out, made)

    def _launch(self, graph: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        graph.fill(self._tensors(args, kwargs))
        graph.replay()
        graph.uses += 1

    def _answer(self, graph: Captured) -> Any:
        for number, made in graph.made.items():
            self.cells[number].made = made  # whoever keeps it copies it
        return map_tensors(Tensor.clone, graph.out)  # the next replay writes over it

    def off(self, reason: str) -> None:
        """Make no graph from now on, and say so once."""
        self.reason, self.final = reason, True
        self.forget()
        self._say(reason)

    def _say(self, reason: str) -> None:
        level = logging.INFO if self.choose else logging.WARNING  # nobody asked for them
        log.log(level, "%s runs without CUDA graphs: %s.", type(self.denoiser).__name__, reason)


def _gains(capture: Capture, replay: Callable[[], Any], call: Callable[[], Any]) -> bool:
    """Whether a graph is faster than the call that it was made of, which has run before."""
    replay()
    turns = [(capture.seconds(replay), capture.seconds(call)) for _ in range(TURNS)]
    graph, plain = map(statistics.median, zip(*turns, strict=True))
    return graph <= GAIN * plain


def _form(given: Any) -> Any:
    """The shapes of what is reused; None: nothing is."""
    return None if given is None else tuple((x.shape, x.dtype) for x in tensors_in(given))
