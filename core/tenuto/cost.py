"""What a run costs: time by paired medians, memory, bytes of weights, multiply-adds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .metrics import percentile

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Latency:
    """Seconds of repeated runs, in the order in which they were made."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The 25th and the 75th percentile."""
        return percentile(self.seconds, 25), percentile(self.seconds, 75)

    def over(self, other: Latency) -> Latency:
        """Run by run, how many times as long as `other`: ratios of runs made side by side."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return Latency(tuple(mine / theirs for mine, theirs in pairs))


def latency(
    fns: dict[str, Callable[[], Any]], repeats: int = 7, warmup: int = 1
) -> dict[str, Latency]:
    """Seconds of each function: they are run in turn `repeats` times, every other time backwards.

    Load from elsewhere and a sinking clock then meet all of them alike. `warmup` runs don't count.
    """
    for fn in fns.values():
        for _ in range(warmup):
            fn()
    found: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(repeats):
        for name in list(fns)[:: -1 if turn % 2 else 1]:
            found[name].append(timed(fns[name])[1])
    return {name: Latency(tuple(seconds)) for name, seconds in found.items()}


def timed(fn: Callable[[], Any]) -> tuple[Any, float]:
    """What `fn` returns and its seconds, with the work it gave to CUDA done."""
    _synchronize()
    start = time.perf_counter()
    result = fn()
    _synchronize()
    return result, time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class PeakMemory:
    """The most memory in use while the context was open: `bytes`, and `source`, what was read.

    On CUDA that is `torch.cuda.max_memory_allocated` of the device, else the whole process: its
    resident set's high-water mark (VmHWM), reset on entry. Where that cannot be reset it is
    `ru_maxrss`, the most since the process began; where there is neither, None.
    """

    bytes: int | None = None
    source: str = ""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            self.source = "max_memory_allocated"
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.source = "VmHWM" if _reset_high_water() else "ru_maxrss"
        return self

    def __exit__(self, *error: object) -> None:
        self.read()

    def read(self) -> None:
        """Set `bytes` to the peak so far."""
        if self.source == "max_memory_allocated":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.source == "VmHWM":
            self.bytes = _high_water()
        else:
            self.bytes = _lifetime_peak()


def _reset_high_water() -> bool:
    try:
        CLEAR.write_text("5", encoding="ascii")
        return _high_water() > 0
    except (OSError, StopIteration):
        return False


def _high_water() -> int:
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def _lifetime_peak() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def resident_weight_bytes(module: nn.Module) -> int:
    """Bytes of every tensor that the modules hold, each storage once.

    Parameters, buffers, tensors in plain attributes, and what a quantized layer packed for its
    kernel. Not features held between steps, nor modules that `attach` took out and keeps for later.
    """
    found = {_place(tensor): _size(tensor) for tensor in _held(module.modules())}
    return sum(found.values())


def _held(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        yield from (v for v in vars(module).values() if isinstance(v, Tensor))
        packed: Any = getattr(module, "packed_tensors", list)
        yield from packed()


def _place(x: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that share memory; a prepacked oneDNN weight has none to show."""
    if x.layout is not torch.strided or not x.untyped_storage().data_ptr():
        return (id(x),)
    return (x.device, x.untyped_storage().data_ptr())


def _size(x: Tensor) -> int:
    if x.layout is not torch.strided:
        return x.numel() * x.element_size()
    return x.untyped_storage().nbytes()


def _plain_attention() -> AbstractContextManager[Any]:
    """Attention by plain products, which a counter sees."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # before torch 2.3
        kernels = {"enable_flash": False, "enable_math": True, "enable_mem_efficient": False}
        return torch.backends.cuda.sdp_kernel(**kernels)
    return sdpa_kernel(SDPBackend.MATH)


def multiply_adds(
    module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], names: Iterable[str] = ()
) -> dict[str, int]:
    """Multiply-adds of one call `module(*args, **kwargs)`: "" the whole, and each submodule named.

    Counted in what runs: Linear, convolution and the two products of attention (computed by plain
    products here, so that each kernel's count is the same). Element-wise work counts nothing.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where there is one

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _plain_attention(), counter:
        module(*args, **kwargs)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(module).__name__
    found = {name: flops.get(f"{root}.{name}", 0) // 2 for name in names}
    return {"": counter.get_total_flops() // 2} | found
