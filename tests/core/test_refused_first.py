"""No recording is wasted: what cannot be is refused before a denoiser is called, in each family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tenuto as tn
from tenuto.errors import TenutoError
from tenuto.model import denoisers_of, watched
from tenuto.numerics import Recipe, Rule
from tests.core.family_pipelines import MODELS, Ready

PROMPTS = ("a dog", "two cats")
LIGHT = ("FLUX.1", "Qwen-Image", "Z-Image", "FLUX.3")  # in each run
CASES = [n if n in LIGHT else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


@cache
def ready(name: str) -> Ready:
    return MODELS[name]()


def denoisers(model: Any) -> Iterator[nn.Module]:
    yield from denoisers_of(model).values()


def attached(model: Any) -> None:
    tn.attach(model, "w8a16")


def on_meta(model: Any) -> None:
    for denoiser in denoisers(model):
        denoiser.to("meta")


def cast(model: Any) -> None:
    from diffusers.hooks import apply_layerwise_casting

    for denoiser in denoisers(model):
        kinds = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
        apply_layerwise_casting(denoiser, **kinds)


def grouped(model: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    for denoiser in denoisers(model):
        apply_group_offloading(denoiser, torch.device("cpu"), offload_type="leaf_level")


def offloaded(model: Any) -> None:
    from accelerate import cpu_offload

    for denoiser in denoisers(model):
        cpu_offload(denoiser, torch.device("cpu"), offload_buffers=True)


def cached(model: Any) -> None:
    from diffusers import FasterCacheConfig

    for denoiser in denoisers(model):
        denoiser._cache_config = FasterCacheConfig()


def compared(model: Any, given: Ready, count: int = 1, **options: Any) -> None:
    """Without an artifact: calls are skipped alone."""
    asked = {"sample": given.sample} if given.sample else {"prompts": PROMPTS, "call": given.call}
    tn.compare(model, None, speedup=2.0, count=count, **asked | options)


def quantized(model: Any, given: Ready, scheme: Any = "w8a8", **options: Any) -> None:
    tn.quantize(model, scheme, PROMPTS, **options)


def routed(model: Any, given: Ready, **options: Any) -> None:
    tn.train_router(model, PROMPTS, **options)


def recorded(model: Any, given: Ready, **options: Any) -> None:
    tn.record(model, PROMPTS, **{"call": given.call, "steps": 4} | options)


EVERY = (quantized, routed, compared)
STATES: list[tuple[Callable[[Any], None], tuple[Callable[..., None], ...], str]] = [
    (attached, EVERY, "attached to the model already"),
    (on_meta, EVERY, "offloaded until they are called"),
    (cast, EVERY, "Layerwise casting is on"), (grouped, EVERY, "Group offloading is on"),
    (offloaded, (routed, compared), "offloaded until they are called"),  # quantize reads blocks
    (cached, (routed, compared), "The FasterCache of diffusers is on"),
]  # fmt: skip
WRONG: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (quantized, {"scheme": "w9a9"}), (quantized, {"scheme": 8}), (quantized, {"preset": "fast"}),
    (quantized, {"temporal": "never"}), (quantized, {"rounding": "up"}),
    (quantized, {"scheme": Recipe([Rule("no.such.layer", tn.schemes.W8A8)])}),
    (quantized, {"scheme": Recipe([Rule("*", tn.schemes.W8A8)]), "rounding": "gptq"}),
    (quantized, {"describe": 3}), (quantized, {"work": Path(__file__)}),
    (routed, {"reuse": 1.5}), (routed, {"reuse": 0.5, "speedup": 2.0}), (routed, {"speedup": 1.0}),
    (routed, {"policy": "none"}), (routed, {"policy": "router", "whole": True}),
    (routed, {"artifact": Path("none.safetensors")}),
    (routed, {"preset": "fast"}), (routed, {"describe": 3}),
    (routed, {"work": Path(__file__)}),
    (compared, {"count": 0}), (compared, {"execution": "int9"}),
]  # fmt: skip
CALLS: list[dict[str, Any]] = [
    {"call": {"hight": 8}}, {"call": {"generator": 3}}, {"steps": 0}, {"batch": 0}, {"runs": 0},
]  # fmt: skip


def refused(model: Any, do: Callable[[], Any], what: Any) -> str:
    """The sentence with which `do()` is refused, before a denoiser is called."""
    calls = list[str]()
    with pytest.raises(TenutoError) as error:
        for denoiser in denoisers(model):
            watch = watched(denoiser, before=lambda name, args, kwargs: calls.append(name))
            watch.__enter__()
        do()
    assert not calls, (what, str(error.value))
    assert str(error.value).endswith(".") and len(str(error.value)) <= 300, what
    return str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_state_of_the_model_is_refused_first(name: str) -> None:
    for change, uses, words in STATES:
        for use in uses:
            given = copy.deepcopy(ready(name))
            change(given.model)
            said = refused(given.model, lambda u=use, g=given: u(g.model, g), (change, use))
            assert words in said, (change, use)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_what_is_asked_wrongly_is_refused_first(name: str) -> None:
    given = copy.deepcopy(ready(name))
    asked = WRONG if given.sample is not None else [*WRONG, *((recorded, c) for c in CALLS)]
    for use, options in asked:
        refused(given.model, lambda u=use, o=options: u(given.model, given, **o), (use, options))
