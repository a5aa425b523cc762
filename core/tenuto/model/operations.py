"""Multiply-adds of one call of a model, by submodule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


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
    found = {name: flops.get(f"{root}.{name}", 0) // 2 for name in names if name}
    return {"": counter.get_total_flops() // 2} | found
