"""Quantize activations to unsigned 8-bit codes.

The oneDNN kernels want uint8, so a symmetric range has zero point 128. On the CPU the work is done
a piece at a time in a buffer that is kept: passes over a cache, and no page faults. Codes come out
by adding 1.5 * 2^23, which leaves the rounded number in the lowest byte of a float. Every device
computes the same codes. On CUDA one kernel of Triton finds the range of a row and writes the codes,
less 128 as int8 (`quantize_input_triton.py`); in a graph that is being made they are plain
operations, which compilers fuse with what comes before, but for long rows: these stay that kernel.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...numerics import float8
from .kernel import graph_operation
from .trial import works

MIDDLE = 128  # zero point of a symmetric range in uint8
TINY = 1e-8
MAGIC = 1.5 * 2**23  # from here to 2^24 floats are whole numbers
PIECE = 2**18  # elements a thread: 1 MiB of floats, about a core's second cache

WIDEST = 2**15  # columns of a row that a kernel of Triton keeps in registers
LONG = 2**12  # compiled code reads so long a row twice, and computes what is before it twice
TYPES = {"int": torch.int8, "e4m3": float8.CODES}  # of codes on CUDA
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

_kept = threading.local()
compiling = getattr(torch.compiler, "is_compiling", bool)  # torch 2.1 has none: False


def reference_per_tensor(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`per_tensor` in plain words."""
    codes = x.float() / scale
    return codes.round_().add_(zero_point).clamp_(0, 255).to(torch.uint8)


def reference_per_row(x: Tensor, dims: tuple[int, ...] = (-1,)) -> tuple[Tensor, Tensor]:
    """`per_row` in plain words."""
    x = x.float()
    scale = x.abs().amax(dims, keepdim=True).div_(127).clamp_min_(TINY)
    return (x / scale).round_().add_(MIDDLE).clamp_(1, 255).to(torch.uint8), scale


def per_tensor(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Codes (uint8, shape of `x`) of a stored range: one `scale` (fp32) and `zero_point`."""
    if not _lean(x):
        return reference_per_tensor(x, scale, zero_point)
    with torch.no_grad():
        rows, restore = _memory_order(x)
        flat = rows.reshape(1, -1)
        codes = torch.empty(flat.shape, dtype=torch.uint8)
        zero = zero_point.float() + MAGIC
        step = _piece()
        for some, out in zip(flat.split(step, 1), codes.split(step, 1), strict=True):
            work = _scratch(some)
            if x.dtype is torch.float32:
                torch.div(some, scale, out=work)
            else:
                work.copy_(some).div_(scale)
            work.round_().add_(zero).clamp_(MAGIC, MAGIC + 255)
            out.copy_(work.view(torch.int32))
        return restore(codes.view(rows.shape))


def per_row(x: Tensor, dims: tuple[int, ...] = (-1,), whole: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and fp32 scales of a symmetric range found over `dims` of `x`.

    dims (-1,) is one range per token (..., 1); (1, 2, 3) one per image (B, 1, 1, 1). Never over
    the batch: an image must not depend on its neighbours. On CUDA codes may be int8, less 128.
    whole: a graph that is being made keeps it as one operation, for `fused_rows.py`.
    """
    if _stays_whole(x, dims, whole):
        return _long_rows(x, "int")
    if fused(x) and dims in ((-1,), (1, 2, 3)):
        from . import quantize_input_triton as kernels

        return kernels.per_image(x) if len(dims) > 1 else kernels.per_row(x)
    if not _lean(x):
        return reference_per_row(x, dims)
    with torch.no_grad():
        ordered, restore = _memory_order(x) if len(dims) > 1 else (x, _same)
        flat = ordered.reshape(-1, ordered[0].numel() if len(dims) > 1 else x.shape[-1])
        codes = torch.empty(flat.shape, dtype=torch.uint8)
        scale = torch.empty(len(flat), 1)
        for some, out, step in _pieces(flat, codes, scale):
            work = _scratch(some)
            if x.dtype is not torch.float32:
                some = work.copy_(some)
            high, low = some.amax(1, keepdim=True), some.amin(1, keepdim=True)
            torch.maximum(high, low.neg_(), out=step).div_(127).clamp_min_(TINY)
            torch.div(some, step, out=work).add_(MAGIC + MIDDLE)
            out.copy_(work.view(torch.int32))
        wide = (*x.shape[:-1], 1) if len(dims) == 1 else (len(x), *[1] * (x.ndim - 1))
        return restore(codes.view(ordered.shape)), scale.view(wide)


def per_row_float8(
    x: Tensor, dims: tuple[int, ...] = (-1,), whole: bool = False
) -> tuple[Tensor, Tensor]:
    """`float8.per_row`, in one kernel where that runs. whole: as in `per_row`."""
    if _stays_whole(x, dims, whole):
        return _long_rows(x, "e4m3")
    if fused(x) and dims == (-1,) and has_float8(x.device.index):
        from .quantize_input_triton import per_row as rows

        return rows(x, "e4m3")
    return float8.per_row(x, dims)


def _stays_whole(x: Tensor, dims: tuple[int, ...], whole: bool) -> bool:
    """Whether a graph that is being made keeps the quantization of `x` as one operation."""
    if not gpu(x) or _long_rows is None or dims != (-1,):
        return False
    return (1 if whole else LONG) <= x.shape[-1] <= WIDEST and compiling()


def gpu(x: Tensor) -> bool:
    """Whether `x` is where kernels of Triton do it."""
    return x.device.type == "cuda"


def _rows_of(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Codes, whole ones as int8 less 128, and scales of a range a row."""
    codes, scale = PER_ROW[dtype](x.contiguous())  # plain operations keep the strides of `x`
    return signed(codes) if dtype == "int" else codes, scale


def _fake_rows(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=TYPES[dtype])
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


_long_rows = graph_operation(
    "quantize_rows(Tensor x, str dtype) -> (Tensor, Tensor)", _rows_of, _fake_rows
)


def fused(x: Tensor) -> bool:
    """Whether the kernels of Triton quantize `x`: real tensors on CUDA, outside graphs."""
    if x.device.type != "cuda" or compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    fits = 0 < x.shape[-1] <= WIDEST and x.numel() > 0
    return fits and x.dtype in FLOATS and triton_runs(x.device.index)


def triton_runs(index: int | None = None) -> bool:
    """Whether the kernels of Triton, 3.4 or newer, work on this CUDA device.

    They need compute capability 8.0 or newer, and are tried: that takes a C compiler.
    """
    if torch.version.hip is not None:
        return False
    index = torch.cuda.current_device() if index is None else index
    return _capability(index) >= (8, 0) and works("quantized layers", index, rows_are_right)


def rows_are_right(device: torch.device) -> bool:
    """Whether the kernel that quantizes rows does it on `device`; errors of Triton are raised."""
    import triton.tools.tensor_descriptor  # noqa: F401 # of 3.4 and newer: the products take it

    from .quantize_input_triton import per_row as rows

    x = torch.tensor([[127.0, -3.0, 0.0, 64.0], [-127.0, 2.0, 1.0, 5.0]], device=device)
    codes, scale = rows(x)
    return bool((codes == x).all()) and bool((scale == 1).all())


def has_float8(index: int) -> bool:
    """Whether a CUDA device casts to the 8-bit float: compute capability 8.9 or newer."""
    return _capability(index) >= (8, 9)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def signed(x: Tensor) -> Tensor:
    """x - 128 as int8, of uint8 codes: the highest bit turned over. Codes in int8 are that."""
    return x if x.dtype is torch.int8 else (x ^ MIDDLE).view(torch.int8)


def counted(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes as numbers that zero points are among: int8 is 128 less than uint8."""
    return codes.to(dtype) + MIDDLE if codes.dtype is torch.int8 else codes.to(dtype)


def _lean(x: Tensor) -> bool:
    """Whether the work is done by pieces: on a CPU and outside compiled regions."""
    return x.device.type == "cpu" and x.numel() > 0 and not compiling()


def _same(x: Tensor) -> Tensor:
    return x


def _memory_order(x: Tensor) -> tuple[Tensor, Any]:
    """`x` with its dimensions as they lie in memory, batch first, and what undoes that."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1), lambda codes: codes.permute(0, 3, 1, 2)
    return x, _same


def _pieces(flat: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal rows of all tensors, about a piece of the first at a time."""
    step = max(1, _piece() // flat.shape[1])
    return zip(*(t.split(step) for t in (flat, *others)), strict=True)


def _piece() -> int:
    return PIECE * torch.get_num_threads()


def _scratch(like: Tensor) -> Tensor:
    """An fp32 buffer of this shape that lives on; larger ones do not."""
    if like.numel() > _piece():
        return torch.empty(like.shape)
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < _piece():
        with torch.inference_mode(False):  # or no one could write to it later
            buffer = _kept.buffer = torch.empty(_piece())
    return buffer[: like.numel()].view(like.shape)


PER_ROW = {"int": per_row, "e4m3": per_row_float8}
ZERO = {"int": MIDDLE, "e4m3": 0}


def stored(x: Tensor, scale: Tensor, zero: Tensor, dtype: str) -> tuple[Tensor, Tensor, Any]:
    """Codes of a stored range, its scale, and the zero point as kernels take it."""
    if dtype == "e4m3":
        return float8.per_tensor(x, scale), scale, 0
    return per_tensor(x, scale, zero), scale, zero.to(torch.int32)


def stored_at(
    x: Tensor, scales: Tensor, zeros: Tensor, index: Tensor, dtype: str
) -> tuple[Tensor, Tensor, Any]:
    """`stored` of one of the ranges (T,), that of `index` int64 (1,), which stays on its device."""
    if fused(x) and (dtype == "int" or has_float8(x.device.index)):
        from .quantize_input_triton import stored as at

        codes, scale, zero = at(x, scales, zeros, index, dtype)
        return codes, scale, zero if dtype == "int" else 0
    scale, zero = (t.index_select(0, index) for t in (scales, zeros))
    return stored(x, scale, zero, dtype)
