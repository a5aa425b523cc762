"""The tiles that a Triton kernel works with: tried once a shape, kept on disk by card and version.

Choices lie in Triton's own cache, beside the compiled kernels. Nothing is timed while a CUDA graph
is captured, nor in the interpreter: there the first tiles serve, and nothing is kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.testing import do_bench

log = logging.getLogger("tenuto")

FILE = "tenuto-tiles.json"
WARM, REPEAT = 5, 20  # ms of each candidate
LONG = 5.0  # seconds of trials, after which a warning says what takes the time


class Tiles(NamedTuple):
    """A tile of the output (m, n), the depth of one step, and how a program is made of it.

    group: so many tiles of rows share what they read of a weight in the L2 cache. tma: tiles come
    by the copy engine of Hopper. persistent: one program a multiprocessor makes several tiles.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 4
    tma: bool = False
    persistent: bool = False
    group: int = 8


_known: dict[tuple[Any, ...], Tiles] = {}
_spent = 0.0  # seconds of trials in this process


def bucket(rows: int) -> int:
    """Rows rounded down to three leading bits: numbers that the same tiles serve."""
    low = max(0, rows.bit_length() - 3)
    return rows >> low << low


def chosen(
    kernel: Any,
    kind: tuple[Any, ...],
    candidates: Sequence[Tiles],
    device: torch.device,
    run: Callable[[Tiles], Any],
) -> Tiles:
    """The fastest of `candidates` for this kind of call, which `run` makes."""
    if device.type != "cuda" or len(candidates) == 1:
        return candidates[0]
    key = (kernel.__name__, device.index, *kind)
    if key not in _known:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        with torch.cuda.device(device):
            _known[key] = _kept(kernel, kind, candidates, device, run) or candidates[0]
    return _known[key]


def _kept(
    kernel: Any,
    kind: Any,
    candidates: Sequence[Tiles],
    device: torch.device,
    run: Callable[[Tiles], Any],
) -> Tiles | None:
    facts = (card(device), triton.__version__, kernel.cache_key, kind, list(candidates))
    name = hashlib.sha256(repr(facts).encode()).hexdigest()
    try:
        file = get_cache_manager(name).get_file(FILE)
        if file is not None:
            return Tiles(*json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, RuntimeError, ValueError, TypeError) as error:  # no folder, or it is broken
        log.debug("The choice of tiles cannot be read: %s.", error)
    start = time.perf_counter()
    found = fastest(candidates, run)
    _explain(time.perf_counter() - start, device)
    try:
        if found is not None:
            get_cache_manager(name).put(json.dumps(found), FILE, binary=False)
    except (OSError, RuntimeError) as error:
        log.debug("The choice of tiles is not kept: %s.", error)
    return found


def _explain(seconds: float, device: torch.device) -> None:
    """Say once, when trials have taken long, what the time goes into."""
    global _spent
    before, _spent = _spent, _spent + seconds
    if before < LONG <= _spent:
        log.warning(
            "Kernels are tried for this model's layers on %s: up to some minutes for a large one, "
            "the first time. The choices are kept.", card(device),
        )  # fmt: skip


def fastest(candidates: Sequence[Tiles], run: Callable[[Tiles], Any]) -> Tiles | None:
    """The one with the least median; those that a card cannot run are left out. None: all are.

    `run` returns the tensors that it made, if any: candidates whose numbers are others than those
    of the first are left out, too. Compilers make mistakes (docs/speed.md).
    """
    found: dict[Tiles, float] = {}
    wanted: list[Tensor] | None = None
    answer: list[Any] = []

    def once(tiles: Tiles) -> Any:
        answer[:] = [run(tiles)]
        return answer[0]

    for tiles in candidates:
        try:
            took = milliseconds(functools.partial(once, tiles))
        except Exception as error:  # Triton has many: too little shared memory, a failed compiler
            log.debug("Tiles %s do not run here: %s.", tiles, error)
            continue
        given = answer[0] if isinstance(answer[0], tuple) else (answer[0],)
        made = [x for x in given if isinstance(x, Tensor)]
        if wanted is None:
            wanted = [x.clone() for x in made]
        elif not all(map(_alike, made, wanted)):
            log.warning("Tiles %s are wrong on this card, and left out.", tiles)
            continue
        found[tiles] = took
    return min(found, key=lambda tiles: found[tiles]) if found else None


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether answers differ by no more than a step of 8 bits, and sums in another order."""
    a, b = found.float(), wanted.float()
    near = (a - b).abs() <= 0.13 * b.abs() + 0.02 * b.abs().nan_to_num(0, 0, 0).max()
    return bool((near | (a == b) | (a.isnan() & b.isnan())).all())


def milliseconds(run: Callable[[], Any]) -> float:
    """The median of one call, the L2 cache cleared before each."""
    return float(do_bench(run, warmup=WARM, rep=REPEAT, return_mode="median"))  # pyright: ignore


def start(kernel: Any, grid: tuple[int, ...], near: Tensor, *args: Any, **options: Any) -> None:
    """Start `kernel` where `near` is: Triton itself takes the device that the process is on."""
    with torch.cuda.device_of(near):
        kernel[grid](*args, **options)


@functools.cache
def card(device: torch.device) -> str:
    """The name of a card: two of one architecture may prefer other tiles."""
    return torch.cuda.get_device_name(device)
