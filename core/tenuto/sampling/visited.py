"""The schedule of a pipeline's own run, at the price of one denoiser call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Signature, denoiser_of, frozen, map_tensors, override_, tensors_in
from .pipeline_call import PipelineCall


def schedule_of_run(
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
) -> tuple[float, ...]:
    """The timesteps that the pipeline visits when it is called like this, in executed order.

    Its own call sets them up, whatever its scheduler wants for that. The denoiser computes once for
    each form of its inputs, and answers with that for the rest of the run.
    """
    asked = PipelineCall(pipe, prompts, steps, guidance, call)
    denoiser = asked.denoiser
    facts, times, known = Signature(denoiser), dict[float, None](), dict[Any, Any]()

    def answer(original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = facts.inputs(args, kwargs)
        times.setdefault(facts.step(inputs))
        form = tuple(tuple(x.shape) for x in tensors_in(facts.sample(inputs)))
        if form not in known:
            known[form] = original(*args, **kwargs)
        return map_tensors(Tensor.clone, known[form])

    patch = override_(denoiser, answer)
    try:
        with frozen(denoiser), torch.no_grad():
            asked(denoiser_of(pipe), 0, 1, "latent")
    finally:
        patch.remove()
    return tuple(times)
