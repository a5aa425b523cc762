"""Whether a tensor is what it was: by its memory and its version, without a look at its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model import tensors_in
from .graph_cases import autocast


def place_of(x: Tensor) -> int:
    """Equal for tensors that share memory."""
    return x.untyped_storage().data_ptr()


def versions(out: Any) -> tuple[int, ...]:
    """How often each of the tensors was written to."""
    return tuple(t._version for t in tensors_in(out))


def plain(x: Any) -> bool:
    """Whether `x` is an ordinary tensor, whose memory has a version."""
    return type(x) in (Tensor, nn.Parameter) and not x.is_inference() and not x.is_meta


def unusual(x: Tensor) -> bool:
    """Whether somebody learns, counts, traces or captures here."""
    if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def key_of(x: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors of the same memory, not written to in between, read alike.

    On CUDA by one stream: another would have to wait for what is made of it.
    """
    form = x.data_ptr(), x.shape, x.stride(), x.dtype, x.device
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return *form, x._version, stream, autocast(x.device.type)


def state_of(module: nn.Module) -> tuple[Any, ...]:
    """Of the weights of a layer: equal while nobody exchanges or writes to them."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype)
        for t in tensors
        if t is not None
    )
