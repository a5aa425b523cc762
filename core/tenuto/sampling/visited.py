"""The schedule of a pipeline's own run, at the price of one call of each denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Override, Signature, all_frozen, map_tensors, override_, parts_of, tensors_in
from .pipeline_call import PipelineCall


def schedule_of_run(
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
) -> tuple[float, ...]:
    """The timesteps that the pipeline visits when it is called like this, in executed order.

    Its own call sets them up, whatever its scheduler wants for that; see `answered_once`.
    """
    asked, times = PipelineCall(pipe, prompts, steps, guidance, call), dict[float, None]()

    def note(name: str, timestep: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        times.setdefault(timestep)

    with answered_once(pipe, note):
        asked(asked.denoiser, 0, 1, "latent")
    return tuple(times)


@contextmanager
def answered_once(
    model: Any, note: Callable[[str, float, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Every denoiser of `model` computes once for each form of its inputs, and repeats that.

    note(name, timestep, args, kwargs) is told of every call, by the names of `parts_of`.
    """
    found, patches = parts_of(model), list[Override]()
    try:
        for name, denoiser in found.items():
            patches.append(override_(denoiser, _answer(name, denoiser, note)))
        with all_frozen(found.values()), torch.no_grad():
            yield
    finally:
        while patches:
            patches.pop().remove()


def _answer(name: str, denoiser: nn.Module, note: Callable[..., None]) -> Callable[..., Any]:
    facts, known = Signature(denoiser), dict[Any, Any]()

    def answer(original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = facts.inputs(args, kwargs)
        note(name, facts.step(inputs), args, kwargs)
        form = tuple(tuple(x.shape) for x in tensors_in(facts.sample(inputs)))
        if form not in known:
            known[form] = original(*args, **kwargs)
        return map_tensors(Tensor.clone, known[form])

    return answer
