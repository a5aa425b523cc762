"""What decides, beside the inputs of a call, which kernels run: a graph is of calls alike in it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F


def about(form: Any) -> Any:
    """The form of a call without its sizes, but for the order of magnitude: prompts differ."""
    parts = [p for p in form if isinstance(p, tuple) and len(p) == 4]
    rest = tuple(p for p in form if not (isinstance(p, tuple) and len(p) == 4))
    numbers = sum(math.prod(shape) for _, shape, _, _ in parts)
    return numbers.bit_length(), *((n, len(shape), *more) for n, shape, *more in parts), *rest


def other_stream() -> bool:
    """Whether calls go to a stream of the user's own, or are being captured by somebody."""
    if torch.cuda.is_current_stream_capturing():
        return True
    return torch.cuda.current_stream() != torch.cuda.default_stream()


def switches() -> tuple[Any, ...]:
    """What else decides which kernels run: attention, precision, deterministic ones."""
    registry = getattr(sys.modules.get("diffusers.models.attention_dispatch"), "__dict__", {})
    backend = getattr(registry.get("_AttentionBackendRegistry"), "_active_backend", None)
    kinds = torch.backends.cuda
    attention = (
        kinds.flash_sdp_enabled(),
        kinds.mem_efficient_sdp_enabled(),
        kinds.math_sdp_enabled(),
    )
    try:
        precision: Any = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # torch's older and newer switches were mixed
        precision = None
    exact = torch.are_deterministic_algorithms_enabled()
    return backend, *attention, precision, exact, id(F.scaled_dot_product_attention)


def autocast(device: str) -> torch.dtype | None:
    """What operations on `device` are cast to by autocast; None: it is off."""
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except TypeError:  # before torch 2.4, which knows the GPU's alone
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


@contextmanager
def casts_uncached(device: str) -> Iterator[None]:
    """Autocast on `device` without the weights that it keeps cast: they are freed when it ends.

    Where it is off nothing is changed: what is compiled goes by this switch, too.
    """
    if autocast(device) is None:
        yield
        return
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
