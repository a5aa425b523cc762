"""Weights that integer products add exactly on any processor, for tests."""

from __future__ import annotations

from torch import Tensor

from tenuto.runtime.kernels import int8_cpu


def for_int_mm(codes: Tensor) -> Tensor:
    """Weights whose products with any input `torch._int_mm` adds exactly on this processor.

    On a CPU without VNNI oneDNN adds pairs of products in 16 bits; the library then splits codes
    above `SAFE_WEIGHT`, which only its own CPU kernel does.
    """
    top = int8_cpu.SAFE_WEIGHT
    return codes.clamp(-top, top) if int8_cpu.saturates() else codes
