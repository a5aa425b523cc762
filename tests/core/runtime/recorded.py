"""`Recorded`: on the CPU what a CUDA graph is on a card, for tests of what is captured and when.

The operations of a call are recorded and done again, in the same memory. Nothing of Python runs at
a replay, so a graph that is out of date answers wrongly; one that reads freed memory is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Recorded:
    """A `Capture`. captured, replayed: how often."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.error: Exception | None = None
        self.times: list[float] = []  # of a replay and of the call as it is, in turn
        self.full: str | None = None

    def __call__(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.error is not None:
            raise self.error
        self.captured += 1
        tape = _Tape()
        with tape:
            out = call()

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, out

    def seconds(self, run: Callable[[], Any]) -> float:
        run()
        return self.times.pop(0)

    def crowded(self) -> str | None:
        return self.full


class _Tape(TorchDispatchMode):
    """Operations in order. What they make stays in memory, as in the pool of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.own: dict[int, Any] = {}  # storages that were made meanwhile

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs as such, as it does in a graph."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when a stream is capturing")
        kwargs = kwargs or {}
        if func is torch.ops.aten.lift_fresh.default:  # a constant of the code
            self._owned(args)
        out = func(*args, **kwargs)
        given = {_key(x) for x in tree_leaves((args, kwargs)) if _dense(x)}
        self._owned([x for x in tree_leaves(out) if _dense(x) and _key(x) not in given])
        self.done.append((func, *(tree_map(self._place, x) for x in (args, kwargs, out))))
        return out

    def _owned(self, tensors: Any) -> None:
        self.own |= {_key(x): x.untyped_storage() for x in tensors}

    def _place(self, x: Any) -> Any:
        if not _dense(x) or _key(x) in self.own:
            return x.detach() if _dense(x) else x
        return _Place(x)

    @torch.no_grad()
    def replay(self) -> None:
        for func, *rest in self.done:
            args, kwargs, out = tree_map(lambda x: x() if isinstance(x, _Place) else x, rest)
            for own, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(own, Tensor) and own.data_ptr() != new.data_ptr():
                    own.copy_(new)


class _Place:
    """Where a tensor lies in memory that is not the graph's own, and that it keeps nobody from

    freeing. The tensor itself may be given other memory meanwhile: that is not looked at.
    """

    def __init__(self, x: Tensor) -> None:
        self.storage, self.dtype = StorageWeakRef(x.untyped_storage()), x.dtype
        self.facts = x.storage_offset(), x.size(), x.stride()

    def __call__(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a graph reads memory that is free"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.facts)


def _dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def alike(found: Tensor, wanted: Tensor, near: float = 1e-5) -> bool:
    """Whether both are one result, but for how a processor rounds: 1e-3 apart in 16 bits."""
    near = near if wanted.dtype.itemsize > 2 else 1e-3
    fits = (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    return fits and bool((found - wanted).norm() <= near * wanted.norm())
