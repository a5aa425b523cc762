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
    used: whether they go to files; chosen: whether that is settled for the block that is looked at.
    beside: bytes that are kept too. maps: the files that there are, which end with their tensors.
    """

    def __init__(self, folder: Path | None, room: Callable[[], int]) -> None:
        self.folder, self.room = folder, room
        self.used = self.chosen = self.said = False
        self.beside = 0
        self.maps = weakref.WeakSet[mmap.mmap]()

    def choose(self, size: int) -> None:
        """Memory or files for a block's inputs of `size` bytes, where that is not chosen yet.

        TenutoError where the disk has too little room.
        """
        if self.chosen:
            return
        need = COPIES * size + self.beside
        self.used, self.chosen = self.folder is not None and need > self.room(), True
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

    def reserve(self, size: int) -> bool:
        """Whether there is room for so many bytes beside the inputs, in memory or on disk."""
        fits = size <= self.room()
        if not fits and (self.folder is None or size > self._free() // 2):
            return False
        self.beside, self.used = size, not fits
        return True

    def _free(self) -> int:
        """Bytes of the disk that are free, for each of the processes that have files there."""
        assert self.folder is not None
        return shutil.disk_usage(self.folder).free // processes().size

    def worth(self, size: int) -> bool:
        """Whether `size` bytes go to a file."""
        return self.used and size >= max(1, SMALL)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose values are to be written; TenutoError where the disk is full."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if not self.worth(size):
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(self.made(size), dtype=dtype).view(tuple(shape))

    def made(self, size: int) -> mmap.mmap:
        """A file of `size` bytes, which has no name; TenutoError where the disk is full."""
        try:
            with tempfile.TemporaryFile(dir=self.folder, suffix=".part") as file:  # see `Work`
                # a full disk is an error now, not a signal later
                if hasattr(os, "posix_fallocate"):
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
        return mapped

    def _full(self, why: str) -> TenutoError:
        return TenutoError(
            f"Neither memory nor the disk of {self.folder} has room for the recorded inputs of a "
            f"block, which {why}: free some, or take fewer prompts or steps, or smaller images."
        )

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows (n, ...) of all `tensors`, as torch.cat; a view where they lie in a row."""
        if not self.used:
            return torch.cat(list(tensors))
        if (found := self._in_a_row(tensors)) is not None:
            return found
        first, start = tensors[0], 0
        found = self.empty((sum(map(len, tensors)), *first.shape[1:]), first.dtype)
        for part in tensors:
            found[start : start + len(part)] = part
            start += len(part)
            self.forget()
        return found

    def _in_a_row(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """All rows as one tensor, where they lie one behind the other in a file."""
        first, place = tensors[0], tensors[0].data_ptr()
        row = first[:1].numel()
        if not row or not _dense(first[0]):
            return None
        for part in tensors:
            here = part.data_ptr(), part.dtype, part.shape[1:], part.stride()[1:]
            if here != (place, first.dtype, first.shape[1:], first.stride()[1:]):
                return None
            if len(part) > 1 and part.stride(0) != row:
                return None
            place += part.nbytes
        mapped, offset = self.file_of(first) or (b"", 0)
        if offset + place - first.data_ptr() > len(mapped):
            return None  # in memory, or in two files that the system has put side by side
        rows = sum(map(len, tensors))
        flat = torch.frombuffer(mapped, dtype=first.dtype, count=rows * row, offset=offset)
        return flat.as_strided((rows, *first.shape[1:]), (row, *first.stride()[1:]))

    def file_of(self, tensor: Tensor) -> tuple[mmap.mmap, int] | None:
        """The file in which a tensor lies, and the byte at which it begins; None: in memory."""
        for mapped in self.maps:
            offset = tensor.data_ptr() - torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
            if 0 <= offset < len(mapped):
                return mapped, offset
        return None

    def forget(self) -> None:
        """Give back the memory that what was read and written takes, where the system can do so.

        It stays in the files; what is looked at next is read again.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self.maps:
                mapped.madvise(mmap.MADV_DONTNEED)


class Columns:
    """Where the tensors of `count` calls go: those of one place in all calls lie in one file.

    A file for each tensor of each call would be more than a process may have open.
    """

    def __init__(self, files: BankFiles, count: int) -> None:
        self.files, self.count, self.left = files, count, count
        self.ends = dict[int, tuple[weakref.ref[mmap.mmap], int]]()  # a file, what is taken of it

    def put(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the tensors of the next call, with the strides of clones."""
        found = [self._put(key, t) for key, t in enumerate(tensors)]
        self.left = max(1, self.left - 1)
        self.files.forget()
        return found

    def _put(self, key: int, tensor: Tensor) -> Tensor:
        if not self.files.worth(self.count * tensor.nbytes):
            return tensor.clone()
        file, end = self.ends.get(key, (None, 0))
        mapped = file and file()  # it ends with the tensors in it
        start = -(-end // tensor.itemsize) * tensor.itemsize
        if mapped is None or start + tensor.nbytes > len(mapped):
            mapped, start = self.files.made(self.left * tensor.nbytes), 0
        self.ends[key] = weakref.ref(mapped), start + tensor.nbytes
        flat = torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        form = torch.empty_like(tensor, device="meta")  # dense, if `tensor` is not
        return flat.as_strided(form.shape, form.stride()).copy_(tensor)


def _dense(x: Tensor) -> bool:
    """Whether its values fill the memory from the first to the last one."""
    return sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 == x.numel()
