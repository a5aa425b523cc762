"""Several processes that do one job together: `accelerate launch`, `torchrun`.

    with launched():
        artifact = quantize(pipe, "w4a8", trajectory, work="folder")

All do the same steps. Where a step has items that do not depend on each other (runs that are
recorded, calls that are replayed, blocks, layers), each is computed by one process, just as a
single process would, and then given to all, in order. Nothing is summed in another order: the
result is that of one process, bit by bit, on equal hardware with as many threads each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import errors
from ..errors import TenutoError
from ..progress import Progress
from ..text import printable
from .plain import Packed, unpacked

WAIT = timedelta(hours=2)  # for a process that lives and says nothing; one that ends is noticed
PIECE = 2**28  # bytes that are sent at once
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what launchers say
Item = TypeVar("Item")
Result = TypeVar("Result")


class Processes:
    """The processes of a job. rank: this one's number; size: how many there are."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, gpus: bool = False) -> None:
        self.rank, self.size, self.group, self.gpus = rank, size, group, gpus
        self.first = rank == 0
        self.busy = False  # with an item of its own

    def told(self, on_progress: Progress | None) -> Progress | None:
        """`on_progress` in the first process, which alone speaks."""
        return on_progress if self.first else None

    def each(self, items: Iterable[Item], compute: Callable[[Item], Result]) -> Iterator[Result]:
        """`compute(item)` of every item, in order, in all processes, which call this alike.

        What an item raises, all raise. Within `compute` a process is on its own.
        """
        if self.size == 1 or self.busy:
            yield from map(compute, items)
            return
        left = iter(items)
        while some := list(islice(left, self.size)):
            own = self._tried(compute, some[self.rank]) if self.rank < len(some) else None
            for place, item in enumerate(some):
                yield (
                    self._shared(place, own)
                    if place == self.rank
                    else self._got(place, compute, item)
                )

    def once(self, compute: Callable[[], Result]) -> Result:
        """What `compute()` gives in the first process, in all of them."""
        (found,) = self.each([None], lambda _: compute())
        return found

    def meet(self) -> None:
        """Go on when all have come here."""
        if self.size > 1 and not self.busy:
            with _told():
                torch.distributed.all_reduce(torch.zeros(1), group=self.group)

    def _tried(
        self, compute: Callable[[Item], Result], item: Item
    ) -> tuple[Result | None, Exception | None]:
        self.busy = True
        try:
            return compute(item), None
        except Exception as error:  # the others are told before it goes on
            return None, error
        finally:
            self.busy = False

    def _shared(self, place: int, own: Any) -> Any:
        """Give what this process has computed to the others."""
        value, error = own
        packed = Packed(lambda x: str(id(x)))
        try:
            said = {"error": [type(error).__name__, str(error)]} if error else {
                "value": packed.put(value)
            }  # fmt: skip
        except TypeError:
            said = {"unfit": True}  # to be sent: each computes it
            packed.tensors.clear()
        forms = [
            [key, str(x.dtype).removeprefix("torch."), list(x.shape), self._device(x)]
            for key, x in packed.tensors.items()
        ]
        text = bytearray(json.dumps(said | {"tensors": forms}).encode())
        self._broadcast(torch.tensor([len(text)]), place)
        self._broadcast(torch.frombuffer(text, dtype=torch.uint8), place)
        for x, form in zip(packed.tensors.values(), forms, strict=True):
            self._bytes(x.detach().to(form[-1]).contiguous(), place)
        if error:
            raise error
        return value

    def _got(self, place: int, compute: Callable[[Item], Any], item: Item) -> Any:
        """What the process `place` has computed."""
        size = torch.zeros(1, dtype=torch.int64)
        self._broadcast(size, place)
        text = torch.zeros(int(size), dtype=torch.uint8)
        self._broadcast(text, place)
        said = json.loads(text.numpy().tobytes())
        tensors = dict[str, Tensor]()
        for key, dtype, shape, device in said["tensors"]:
            tensors[key] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            self._bytes(tensors[key], place)
        if "error" in said:
            kind, words = said["error"]
            raise _elsewhere(getattr(errors, kind, TenutoError), words)
        if "unfit" in said:
            value, error = self._tried(compute, item)
            if error:
                raise error
            return value
        return unpacked(said["value"], tensors)

    def _device(self, x: Tensor) -> str:
        return "cuda" if x.is_cuda and self.gpus else "cpu"

    def _bytes(self, x: Tensor, place: int) -> None:
        """Broadcast a contiguous tensor as the bytes that it is."""
        if x.numel():
            flat = x.as_strided((x.numel(),), (1,)).view(torch.uint8)
            for start in range(0, len(flat), PIECE):
                self._broadcast(flat[start : start + PIECE], place)

    def _broadcast(self, x: Tensor, place: int) -> None:
        with _told():
            torch.distributed.broadcast(x, group_src=place, group=self.group)


_here = [Processes()]  # the last one is in use


def processes() -> Processes:
    """The processes of the job that is done: one, unless this is within `launched`."""
    return _here[-1]


def launched_size() -> int:
    """How many processes a launcher has started this one with, by the environment."""
    try:
        return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(n) for n in NEEDED) else 1
    except ValueError:
        return 1


def started_alone() -> bool:
    """Whether accelerate was asked for several processes and has started this one alone.

    That is what it does without --multi_gpu: it says where they meet, and no number of them.
    """
    return {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and launched_size() == 1


@contextmanager
def launched(wait: timedelta = WAIT) -> Iterator[Processes]:
    """Within, this process and those that a launcher has started with it do a job together.

    Each has a GPU of its own where there are as many: the one called "cuda". Where one ends,
    whatever the reason, the others raise TenutoError; they wait at most `wait` for one another.
    """
    size = launched_size()
    if size < 2:
        yield processes()
        return
    import torch.distributed as dist

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK") or 0)
    if int(os.environ.get("LOCAL_WORLD_SIZE") or size) != size:
        raise TenutoError("The processes of a job share a work folder: start all on one machine.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        torch.cuda.set_device(local % count)
    gpus = count >= size and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    known = dist.is_initialized()
    with _told():
        if not known:
            dist.init_process_group(backend, timeout=wait, rank=rank, world_size=size)
        own: Any = dist.new_group(backend=backend, timeout=wait)
    _here.append(Processes(rank, size, own, gpus))
    try:
        yield processes()
        processes().meet()
    finally:
        _here.pop()
        with suppress(RuntimeError, ValueError):  # this is what tells the others of an error
            dist.destroy_process_group(own if known else None)


@contextmanager
def _told() -> Iterator[None]:
    """Whatever the connection raises becomes one sentence."""
    try:
        yield
    except RuntimeError as error:
        said = "Another process of this job has ended, or does not answer: see what it said."
        raise TenutoError(said) from error


def _elsewhere(kind: type[Exception], words: str) -> Exception:
    """An error that another process tells the user."""
    error = kind(printable(words))
    error.elsewhere = True  # type: ignore[attr-defined]
    return error
