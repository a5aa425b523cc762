"""Memory: the peak of a process or a GPU, and the bytes of a model's weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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


def resident_weight_bytes(*models: nn.Module) -> int:
    """Bytes of every tensor that the modules of these models hold, each storage once.

    Parameters, buffers, tensors in plain attributes, and what a quantized layer packed for its
    kernel. Not features stored between steps, nor modules that `attach` took out for later.
    """
    modules = (module for model in models for module in model.modules())
    found = {_place(tensor): _size(tensor) for tensor in _tensors_of(modules)}
    return sum(found.values())


def _tensors_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
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
