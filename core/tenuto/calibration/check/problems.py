"""What does not work with a model, or not as one would think: the sentences, collected.

Most of them are those that the functions themselves raise, at the point where they would.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from ...caching import SHORTEST
from ...errors import TenutoError
from ...model import (
    Backbone,
    adapted,
    check_fused,
    check_weights,
    denoisers_of,
    encoders_of,
    refuse_cache,
)
from ...model.parts import uncompiled
from ...model.signature import STEP_NAMES
from ...runtime import check_free
from .report import COMPARE, ENCODERS, QUANTIZE, ROUTER, USES, Problem, gib, percent

LEAST = 0.05  # of the weights that must lie in branches for a cache schedule to gain anything
MOST = 0.5  # of the weights that are quantized below which it is worth a word


def refused(
    stops: tuple[str, ...], check: Callable[..., Any], *arguments: Any
) -> Iterator[Problem]:
    """The sentence that `check` raises, if it does."""
    try:
        check(*arguments)
    except TenutoError as error:
        yield Problem(" ".join(str(error).split()), stops)


def of_model(denoiser: nn.Module, loaded: bool) -> Iterator[Problem]:
    """What the denoiser's own state makes impossible. loaded: whether it has its weights."""
    if loaded:
        yield from refused(USES, check_free, denoiser)
    yield from refused((QUANTIZE, COMPARE), check_fused, denoiser)
    yield from refused(
        (ROUTER, COMPARE),
        refuse_cache,
        denoiser,
        "a search for what can be reused, or a comparison",
    )
    method = quantized_by(denoiser)
    if method is not None:
        yield Problem(
            f"The weights are quantized by {method} already: take the model in full precision.",
            (QUANTIZE,),
        )
    if adapted(denoiser):
        yield Problem(
            "A LoRA is loaded: runs are recorded with it, the weights beneath it are quantized.",
            concerns=(QUANTIZE, ROUTER),
        )


def of_encoders(title: str, model: Any, quantizable: bool, loaded: bool) -> Iterator[Problem]:
    """What makes it impossible to quantize the text encoders of a pipeline."""
    if not quantizable:
        yield Problem(f"{title} has no text encoder to quantize.", (ENCODERS,))
    for encoder in encoders_of(model).values() if loaded else ():
        yield from refused((ENCODERS,), check_weights, encoder)


def of_layers(parameters: int, quantized: int) -> Iterator[Problem]:
    """Where little or nothing is quantized."""
    if not quantized:
        yield Problem("No layer of the model matches the recipe.", (QUANTIZE,))
    elif quantized < MOST * parameters:
        share = quantized / parameters
        yield Problem(
            f"Only {percent(share)} of the weights are in layers that can be quantized.",
            concerns=(QUANTIZE,),
        )


def of_branches(name: str, backbone: Backbone, share: float) -> Iterator[Problem]:
    """Where a cache schedule has nothing to reuse, or nothing that counts."""
    if not backbone.branches:
        yield Problem(f"{name} has no branch that can be reused.", (ROUTER,))
    elif share < LEAST:
        yield Problem(
            f"The parts that can be reused do {percent(share)} of the work: a cache schedule would "
            "gain nothing. Describe the model (`describe=`) if it has others.",
            (ROUTER,),
        )


def of_steps(steps: int) -> Iterator[Problem]:
    """Where a run is too short to reuse anything."""
    if steps == 1:
        yield Problem("With one step there is nothing to reuse.", (ROUTER,))
    elif 1 < steps < SHORTEST:
        yield Problem(
            f"{steps} steps are few for a cache schedule: other runs of fewer than {SHORTEST} "
            "steps will reuse nothing.",
            concerns=(ROUTER,),
        )


def of_machine(memory: Mapping[str, Any]) -> Iterator[Problem]:
    """Where the memory that is free is less than what quantizing takes."""
    free, needed, least = memory["free"], memory["needed"], memory.get("by block", 0)
    if free is not None and needed > free:
        less = f" (block by block, --low-memory, {gib(least)})" if 0 < least < needed else ""
        yield Problem(
            f"Quantizing takes about {gib(needed)} of memory on {memory['on']}{less}, and "
            f"{gib(free)} are free.",
            concerns=(QUANTIZE,),
        )


def of_pipeline(model: Any, denoiser: nn.Module) -> Iterator[Problem]:
    """What a pipeline has beside the denoiser that is calibrated."""
    for name, cls in further(model, denoiser).items():
        yield Problem(f"{name} ({cls}) is called too, and stays as it is.", concerns=(QUANTIZE,))
    wrapped = (part for part in parts_of(model).values() if uncompiled(part) is denoiser)
    compiled = any(part is not denoiser for part in wrapped)
    if compiled or denoiser._compiled_call_impl is not None:
        yield Problem(
            "The denoiser is compiled: calibration runs a copy that is not, and what is attached "
            "breaks the graph."
        )


def further(model: Any, denoiser: nn.Module) -> dict[str, str]:
    """Networks of a pipeline that get the timestep and are no denoisers: name, class name."""
    found = {name: uncompiled(part) for name, part in parts_of(model).items()}
    own = denoisers_of(model)
    return {
        name: type(part).__name__
        for name, part in found.items()
        if name not in own and part is not denoiser and takes_timestep(part)
    }


def parts_of(model: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by name; a bare denoiser has none beside itself."""
    held = {"": model} if isinstance(model, nn.Module) else vars(model)
    return {name: part for name, part in held.items() if isinstance(part, nn.Module)}


def takes_timestep(module: nn.Module) -> bool:
    """Whether it is called at every step of a run."""
    names = inspect.signature(type(module).forward).parameters
    return bool(set(STEP_NAMES) & set(names))


def quantized_by(denoiser: nn.Module) -> str | None:
    """What has quantized a model's weights before, as diffusers notes it; None: nothing."""
    config: Any = getattr(denoiser, "config", None)
    found = config.get("quantization_config") if hasattr(config, "get") else None
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method) or "another library")
