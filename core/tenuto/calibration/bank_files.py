"""`BankFiles`: recorded inputs on disk where memory has no room for them.

They are ordinary tensors, mapped from files in the job's work folder. Such a file has no name (or
one that the system removes): nothing is left of a job that is done, stopped or killed, and one that
goes on records them again.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TenutoError
from ..sampling import processes

log = logging.getLogger("tenuto")

COPIES = 4  # of a block's recorded inputs: of two models, and the outputs of both
SMALL = 2**16  # bytes of a tensor that is not worth a file
GIB = 2**30


class BankFiles:
    """Room for recorded inputs: memory, or files in `folder` where that is too small.

    room: says how many bytes of memory they may take. folder: None: there is memory alone.
    used: whether they are in files now; None: not chosen yet. beside: bytes that are kept too.
    """

    def __init__(self, folder: Path | None, room: Callable[[], int]) -> None:
        self.folder, self.room = folder, room
        self.used: bool | None = None
        self.beside = 0
        self.maps = weakref.WeakSet[mmap.mmap]()
        self.said = False

    def choose(self, size: int) -> None:
        """Memory or files for a block's inputs of `size` bytes, where that is not chosen yet.

        TenutoError where the disk has too little room.
        """
        if self.used is not None:
            return
        need = COPIES * size + self.beside
        self.used = self.folder is not None and need > self.room()
        if not self.used:
            return
        free = self._free()
        if need > free:
            raise self._full(f"takes about {need / GIB:.2f} GiB and {free / GIB:.2f} are free")
        if not self.said:
            log.warning(
                "Recorded inputs of a block go to disk, about %.2f GiB in %s: memory has no room.",
                need / GIB, self.folder,
            )  # fmt: skip
        self.said = True

    def takes(self, size: int) -> bool:
        """Whether there is room for so many bytes beside the inputs, in memory or on disk."""
        if size <= self.room() or self.folder is None:
            return size <= self.room()
        return size <= self._free() // 2

    def _free(self) -> int:
        """Bytes of the disk that are free, for each of the processes that have files there."""
        assert self.folder is not None
        return shutil.disk_usage(self.folder).free // processes().size

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose values are to be written; TenutoError where the disk is full."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if not self.used or size < SMALL:
            return torch.empty(tuple(shape), dtype=dtype)
        try:
            with tempfile.TemporaryFile(dir=self.folder, suffix=".part") as file:  # see `Work`
                if hasattr(
                    os, "posix_fallocate"
                ):  # a full disk is an error now, not a signal later
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise self._full(f"takes {size / GIB:.2f} GiB more than is free") from error
            said = error.strerror or error
            raise TenutoError(f"Cannot keep recorded inputs in {self.folder}: {said}.") from error
        self.maps.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))

    def _full(self, why: str) -> TenutoError:
        return TenutoError(
            f"Neither memory nor the disk of {self.folder} has room for the recorded inputs of a "
            f"block, which {why}: free some, or take fewer prompts or steps, or smaller images."
        )

    def put(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same tensors, where they are to be."""
        found = [self.joined([t[None]])[0] for t in tensors] if self.used else list(tensors)
        self.forget()
        return found

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows (n, ...) of all `tensors`, as torch.cat."""
        if not self.used:
            return torch.cat(list(tensors))
        first, start = tensors[0], 0
        found = self.empty((sum(map(len, tensors)), *first.shape[1:]), first.dtype)
        for part in tensors:
            found[start : start + len(part)] = part
            start += len(part)
            self.forget()
        return found

    def forget(self) -> None:
        """Give back the memory that what was read and written takes, where the system can do so.

        It stays in the files; what is looked at next is read again.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self.maps:
                mapped.madvise(mmap.MADV_DONTNEED)
