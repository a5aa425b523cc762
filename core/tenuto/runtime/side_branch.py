"""Streams beside the main one in a CUDA graph, for what blocks make of a step alone.

In a graph that is being captured the first part of a block (`early_part.py`) waits for nothing but
its own inputs, which were there before the first block, and the block waits for it. Replayed, these
parts run side by side: each is a chain of kernels too small for a card, and on one stream beside
the blocks they would slow these down for as long as all of them take. Without a capture all runs in
one stream.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

STREAMS = 4  # each has memory of its own for products, some 32 MiB
Asked = tuple[int, ...]  # which inputs of a part the call makes: the others are the block's own
_here = threading.local()


class Branch:
    """Of one capture: streams beside the current one. known: inputs, with when they were made."""

    def __init__(self, streams: Sequence[Any]) -> None:
        self.streams = itertools.cycle(streams)
        self.known: dict[Any, tuple[Tensor, Any]] = {}

    def __call__(self, part: Any, inputs: Sequence[Any], asked: Sequence[Tensor]) -> Any:
        """part(*inputs), beside what the current stream was given since `asked` were made."""
        main, beside = torch.cuda.current_stream(), next(self.streams)
        for x in asked:
            beside.wait_event(self._since(x, main))
        with torch.cuda.stream(beside):
            made = part(*inputs)
            end = beside.record_event()
        main.wait_event(end)
        for x in made:
            x.record_stream(main)
        return made

    def _since(self, x: Tensor, main: Any) -> Any:
        """A moment when a tensor was made; of one that is not known yet, now.

        What is known is kept: its memory is nobody else's until the capture ends.
        """
        facts = _facts(x)
        if facts not in self.known:
            self.known[facts] = x, main.record_event()
        return self.known[facts][1]


def _facts(x: Tensor) -> Any:
    """What tells one tensor from another, and from itself before it was written to."""
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x._version


@contextlib.contextmanager
def branching(streams: Sequence[Any]) -> Iterator[None]:
    """While a graph is captured on this thread: parts of blocks run on `streams`, in turn."""
    _here.branch = Branch(streams)
    try:
        yield
    finally:
        _here.branch = None


def ahead(part: Callable[..., Any], inputs: Sequence[Any], asked: Asked) -> Any:
    """part(*inputs): on the branch of this thread's capture, if there is one.

    Not of tensors made in inference mode: nobody counts how often these are written to.
    """
    branch, tensors = getattr(_here, "branch", None), [inputs[n] for n in asked]
    plain = [x for x in tensors if isinstance(x, Tensor)]
    if branch is None or not plain or any(x.is_inference() for x in plain):
        return part(*inputs)
    return branch(part, inputs, plain)
