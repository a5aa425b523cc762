"""`Lock`: one job at a time in a folder, whichever process it is in."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from .errors import TenutoError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_threads: dict[str, threading.Lock] = {}  # by file


class Lock:
    """One job at a time in a folder: another process gets TenutoError. A kill frees it.

    The folder itself is locked, where the system can do so, and nothing is left in it. A process
    may lock a folder several times: its parts work on one job.
    """

    locks: ClassVar[dict[str, list[Any]]] = {}  # folder -> [its open file, how many use it]

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.key: str | None = os.path.realpath(folder)
        known = self.locks.get(self.key)
        if known is None:
            known = self.locks[self.key] = [_locked(folder), 0]
        known[1] += 1

    def release(self) -> None:
        """Let another process in; twice does no harm."""
        key, self.key = self.key, None
        if key is None:
            return
        known = self.locks[key]
        known[1] -= 1
        if not known[1]:
            _unlock(self.locks.pop(key)[0])

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


@contextmanager
def one_at_a_time(file: Path, wait: float = 10.0) -> Iterator[None]:
    """While it lasts, no other thread or process of this machine is in it for `file`.

    After `wait` seconds, and where the system cannot lock, it goes on all the same. Nothing is
    left beside the file: one of the system's temporary folder is locked in its place.
    """
    name = hashlib.sha256(os.path.realpath(file).encode()).hexdigest()[:32]
    place, until = Path(tempfile.gettempdir()) / f"tenuto-{name}.lock", time.monotonic() + wait
    threads = _threads.setdefault(name, threading.Lock())
    alone = threads.acquire(timeout=wait)
    found: int | None = None
    try:
        with suppress(OSError):  # another user's: then there is no lock
            found = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
            while not _is_locked(found) and time.monotonic() < until:
                time.sleep(0.01)
        yield
    finally:
        if found is not None:
            _unlock(found)
        if alone:
            threads.release()


def _is_locked(file: int) -> bool:
    """Whether this process has the lock of an open file now, or no system gives one."""
    try:
        _lock(file)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def _locked(folder: Path) -> int:
    """An open file whose lock this process has."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder
        if fcntl is None:  # Windows locks no folder: a file elsewhere stands for it
            name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:32]
            place = Path(tempfile.gettempdir()) / f"tenuto-{name}.lock"
        found = os.open(place, os.O_RDONLY if fcntl else os.O_RDWR | os.O_CREAT)
        try:
            _lock(found)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                owner = _owner(found)
                os.close(found)
                raise TenutoError(
                    f"Another job works in {folder}{owner}: wait until it is done, or choose "
                    "another output."
                ) from error  # any other: a file system without locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(found), place.stat()):
                return found
        _unlock(found)  # the job before this one has removed the folder meanwhile


def _owner(file: int) -> str:
    """ ", process N" for the one that has the lock of an open file; "" where no system says so."""
    inode = str(os.fstat(file).st_ino)
    try:
        lines = Path("/proc/locks").read_text().splitlines()  # of Linux
    except OSError:
        return ""
    held = (words for line in lines if len(words := line.split()) > 5 and words[1] == "FLOCK")
    found = {words[4] for words in held if words[5].rpartition(":")[2] == inode}
    number = found.pop() if len(found) == 1 else "0"  # files of two disks may have one number
    return f", process {number}" if number.isdigit() and number != "0" else ""


def _lock(file: int) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]


def _unlock(file: int) -> None:
    """Let go of it, in a forked process too, and close it."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)
