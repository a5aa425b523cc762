"""A backend of torch.compile: what is ours in a graph is fused, and the rest is Inductor's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..text import first_line
from .early_part import compiled_apart
from .fused_gate import gate
from .fused_group_norm import norm
from .fused_residual import finish
from .fused_rotary import turn
from .fused_rows import fuse
from .joint_products import join
from .kernels.quantize_input import gpu

log = logging.getLogger("tenuto")


def backend(
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    backend: Callable[..., Any] | str = "inductor",
) -> Callable[[fx.GraphModule, Sequence[Any]], Any]:
    """What `Module.compile(backend=...)` takes, of torch.compile's own arguments."""
    patches = dict(options or {})
    if mode not in (None, "default"):
        from torch._inductor import list_mode_options

        patches = dict(list_mode_options(mode)) | patches

    def compiled(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        try:
            norm(module)
            fuse(module)
            gate(module)
            turn(module)
            join(module, inputs)
            finish(module)
        except Exception as error:  # of any kind: another torch may write its graphs otherwise
            log.warning(
                "Blocks are compiled without kernels that fuse operations: %s.", first_line(error)
            )
        rest: Any = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend

        def alone(module: fx.GraphModule, given: Sequence[Any]) -> Any:
            own: Any = list(given)
            return rest(module, own, config_patches=patches) if patches else rest(module, own)

        parts = None
        if any(isinstance(x, Tensor) and gpu(x) for x in inputs):
            try:
                parts = compiled_apart(module, inputs, alone)
            except Exception as error:  # as above
                log.warning("Blocks are compiled in one part: %s.", first_line(error))
        return alone(module, inputs) if parts is None else parts

    return compiled
