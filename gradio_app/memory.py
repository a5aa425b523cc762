"""Memory that the app gives back: glibc keeps a heap for every thread, and what was freed in it."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any

ARENA_MAX = -8  # of mallopt: how many heaps there may be
HEAPS = 2


def few_heaps() -> None:
    """Let all threads share a few heaps, before they are started: glibc alone has several."""
    with contextlib.suppress(AttributeError, OSError):
        _libc().mallopt(ARENA_MAX, HEAPS)


def give_back() -> None:
    """Give the system what was freed, after an image."""
    with contextlib.suppress(AttributeError, OSError):
        _libc().malloc_trim(0)


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
