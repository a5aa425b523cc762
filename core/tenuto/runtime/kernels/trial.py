"""Whether the kernels in Triton work on a card: a small one is tried once, before a layer needs it.

Triton may import and yet compile nothing: without a C compiler or Python's headers, or for a card
that is newer than its assembler. A layer that has begun with a kernel has no other way any more.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable

import torch

from ...model import outside_graphs
from ...text import first_line

log = logging.getLogger("tenuto")

_found: dict[tuple[str, int], bool] = {}
_lock = threading.Lock()


def works(what: str, index: int | None, right: Callable[[torch.device], bool]) -> bool:
    """Whether `right` is true on a CUDA device, the current one for None; it is asked once.

    what: what the kernels are for. An error is False, and logged. Also False, without a trial,
    while a CUDA graph is captured, and where no Triton is installed.
    """
    if index is None:
        index = torch.cuda.current_device()
    found = _found.get((what, index))
    return _asked(what, index, right) if found is None else found


@outside_graphs
def _asked(what: str, index: int, right: Callable[[torch.device], bool]) -> bool:
    """`works` of a card that was not tried yet."""
    with _lock:  # two threads compile it once, and say once that it fails
        if (what, index) not in _found:
            answer = _tried(what, torch.device("cuda", index), right)
            if answer is None:
                return False
            _found[what, index] = answer
        return _found[what, index]


def _tried(what: str, device: torch.device, right: Callable[[torch.device], bool]) -> bool | None:
    """The answer of `right`; None where it is not to be asked now."""
    try:
        if importlib.util.find_spec("triton") is None:
            return False
        if torch.cuda.is_current_stream_capturing():
            return None
        with torch.cuda.device(device), torch.no_grad():
            if right(device):
                return True
        said = "its numbers are wrong"
    except Exception as error:  # of any kind: compilers and broken installs have many
        said = first_line(error) or type(error).__name__
    log.warning("Triton fails on %s (%s): slower operations serve for %s.", device, said, what)
    return False
