"""Multiply-adds of one call of a model, by submodule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .watch import watched


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
    products here, so that each kernel's count is the same). Element-wise work counts nothing. Of a
    model that torch's counter cannot follow, the layers alone.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where there is one

    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), _plain_attention(), counter:
            module(*args, **kwargs)
    except Exception as error:
        if "flex_attention" not in str(error):
            raise
        torch._dynamo.reset()  # in torch 2.13 plain calls of it fail too after this one
        return _of_layers(module, args, kwargs, names)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(module).__name__
    found = {name: flops.get(f"{root}.{name}", 0) // 2 for name in names if name}
    return {"": counter.get_total_flops() // 2} | found


def _of_layers(
    module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], names: Iterable[str]
) -> dict[str, int]:
    """`multiply_adds` of the layers of `module` and nothing else."""
    found = {"": 0} | {name: 0 for name in names if name}
    kinds = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def note(name: str, args: Any, kwargs: Any, out: Tensor) -> None:
        for whole in found:
            if not whole or f"{name}.".startswith(f"{whole}."):
                found[whole] += out.numel() * kinds[name].weight[0].numel()

    with torch.no_grad(), watched(module, kinds, after=note):
        module(*args, **kwargs)
    return found
