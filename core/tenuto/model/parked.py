"""`Parked`: the float weights that replacements stand for, out of the way while they are attached.

Nothing computes with the weight of a layer that is quantized, nor, at most steps, with a module
that a table replaces. They go to main memory, or to a file of the temporary folder that has no
name and ends with its last tensor; they come back bit for bit.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import ModelError, TenutoError
from .patches import Swap

PLACES = ("keep", "cpu", "disk")
ALIGNED = 64  # bytes


def check_originals(place: str) -> str:
    """`place` itself; TenutoError names the choices."""
    if place not in PLACES:
        raise TenutoError(f"Unknown originals={place!r}: choose one of {', '.join(PLACES)}.")
    return place


class Parked:
    """A patch that keeps what `swaps` took out of `models` in main memory ("cpu") or on "disk".

    What is still part of a model, such as the bias of a quantized layer, stays where it is. What is
    put in has its method `park` called, if there is one. ModelError, with nothing changed, if the
    disk is full.
    """

    def __init__(self, swaps: Iterable[Swap], models: Iterable[nn.Module], place: str) -> None:
        self.swaps = [swap for swap in swaps if swap.old is not None]
        used = {_memory(t) for model in models for t in _tensors(model)}
        self.moved: list[tuple[Swap, Tensor]] = []
        known = set(used)
        for swap in self.swaps:
            assert swap.old is not None
            for tensor in _tensors(swap.old):
                if not tensor.is_meta and tensor.numel() and _memory(tensor) not in known:
                    known.add(_memory(tensor))
                    self.moved.append((swap, tensor))
        self._put(place)
        self._tell(True)

    def _put(self, place: str) -> None:
        tensors = [tensor for _, tensor in self.moved]
        if place == "disk":
            mapped, twins = _in_file(tensors)
            for tensor, twin in zip(tensors, twins, strict=True):
                twin.copy_(tensor.detach())
                tensor.data = twin
                if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                    mapped.madvise(mmap.MADV_DONTNEED)  # it is in the file, and read when looked at
        else:
            for tensor in tensors:
                tensor.data = tensor.data.to("cpu")

    def remove(self) -> None:
        """Bring everything back to where its replacement is by now."""
        for swap, tensor in self.moved:
            if swap.old is None:
                continue
            device = swap.device()
            away = device is None or device.type == "meta"
            tensor.data = tensor.data.to(tensor.device if away else device, copy=True)
        self._tell(False)
        self.moved, self.swaps = [], []

    def _tell(self, away: bool) -> None:
        for swap in self.swaps:
            swap.parked = away
            if hasattr(swap.new, "park"):
                swap.new.park(away)  # type: ignore[operator]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _memory(tensor: Tensor) -> int:
    """Equal for two tensors in the same memory."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _in_file(tensors: Sequence[Tensor]) -> tuple[mmap.mmap | None, list[Tensor]]:
    """One file, and a tensor like each of `tensors`, on the CPU, whose memory it is."""
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
    if not size:
        return None, []
    mapped = _mapped(size)
    return mapped, [
        _like(t, torch.frombuffer(mapped, dtype=t.dtype, count=t.numel(), offset=start))
        for t, start in zip(tensors, starts, strict=True)
    ]


def _like(tensor: Tensor, flat: Tensor) -> Tensor:
    """`flat` in the shape of `tensor`, with its strides where it leaves no gaps: channels last."""
    strides = torch.empty_like(tensor, device="meta").stride()
    return flat.as_strided(tensor.shape, strides)


def _mapped(size: int) -> mmap.mmap:
    """A file of `size` bytes without a name."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a signal later
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            gib = size / 2**30
            raise ModelError(
                f"The disk of {folder} has no room for {gib:.2f} GiB of float weights: keep them "
                "in main memory with originals='cpu', or set TMPDIR to another folder."
            ) from error
        raise ModelError(f"Cannot keep float weights in {folder}: {error.strerror}.") from error
