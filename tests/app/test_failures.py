"""Errors that are not the library's own: each becomes words that a user can act on."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from gradio_app.failures import DISK, MEMORY, OTHER_SIZES, ended, sentence


def raised(work: object) -> BaseException:
    """What a call raises."""
    with pytest.raises(Exception) as found:
        work()  # type: ignore[operator]
    return found.value


def test_memory_that_is_not_enough() -> None:
    """As torch says it of the machine, of a GPU, and Python."""
    huge = raised(lambda: torch.empty(2**60, dtype=torch.uint8))
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    for error in (huge, gpu, MemoryError()):
        assert sentence(error) == MEMORY, error
    assert MEMORY in ended(-9) and ended(7) == "The worker ended by itself (exit code 7)."


def test_sizes_that_do_not_fit() -> None:
    for work in (
        lambda: torch.ones(2, 3) + torch.ones(2, 4),
        lambda: torch.cat([torch.ones(1, 2, 3), torch.ones(1, 2, 4)], 1),
        lambda: nn.Linear(4, 2)(torch.ones(1, 5)),
        lambda: torch.ones(5).reshape(2, 3),
    ):
        said = sentence(raised(work))
        assert said.startswith(OTHER_SIZES) and said.endswith("."), said


def test_what_the_system_says_of_files() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")
    for error in (full, SafetensorError(f"I/O error: {full.strerror} (os error 28)")):
        assert sentence(error) == DISK
    gone = FileNotFoundError(2, "No", "/a/b")
    assert sentence(gone).startswith("b is not there any more")
    denied = PermissionError(errno.EACCES, "Permission denied", "/a/b.png")
    assert sentence(denied) == "b.png cannot be read or written: Permission denied."
    assert sentence(OSError("strange\nmore")) == "strange."


def test_what_nobody_expects_keeps_its_words() -> None:
    said = sentence(KeyError("x"))
    assert "KeyError: 'x'." in said and sentence(ValueError()).endswith(": ValueError.")
    assert len(sentence(ValueError("y" * 9999))) < 300
