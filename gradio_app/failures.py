"""What went wrong where the library has no sentence for it: memory, the disk, sizes, the rest."""

from __future__ import annotations

import sys
from pathlib import Path

from tenuto.text import first_line, printable

LIMIT = 150  # characters of another library's words
MEMORY = (
    "There is not enough memory: choose a smaller image or fewer frames, or end other programs."
)
DISK = "The disk is full: make room, and try again."
OTHER_SIZES = (
    "The model cannot compute these sizes: leave height and width empty, or take multiples of 64."
)
SIZES = (
    "size of tensor", "Sizes of tensors", "shapes cannot be multiplied", "size mismatch",
    "invalid for input of size",
)  # fmt: skip
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as torch says it
KILLED = -9  # exit code of a process that the system has ended


def sentence(error: BaseException) -> str:
    """What went wrong and what to do; what nobody expects keeps its type and its words."""
    if no_memory(error):
        return MEMORY
    if "No space left" in str(error):  # of safetensors, too
        return DISK
    if isinstance(error, OSError):
        return _of_the_system(error)
    said = printable(" ".join(first_line(error, LIMIT).split()), LIMIT).rstrip(".")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in SIZES):
        return f"{OTHER_SIZES} The error: {said}."
    kind = type(error).__name__
    return f"An unexpected error, the log has more: {f'{kind}: {said}' if said else kind}."


def ended(code: int) -> str:
    """One sentence for a process that ended without a word. code: its exit code."""
    if code == KILLED and sys.platform != "win32":
        return (
            f"The worker was ended from outside (exit code {code}): the system does so when memory "
            f"runs out. {MEMORY}"
        )
    return f"The worker ended by itself (exit code {code})."


def no_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the machine."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _of_the_system(error: OSError) -> str:
    """A file that is missing, a full disk."""
    name = printable(Path(str(error.filename)).name, 100) if error.filename else ""
    if isinstance(error, FileNotFoundError) and name:
        return f"{name} is not there any more: choose the model and the artifact again."
    said = error.strerror or printable(first_line(error, LIMIT), LIMIT)
    return f"{name} cannot be read or written: {said}." if name else f"{said.rstrip('.')}."
