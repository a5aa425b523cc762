"""Guidance by a further pass of the same step, by ComfyUI's own nodes: its features are its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.caching.interval import LateInterval
from tenuto.runtime import Patches

STEPS, SLIGHT = 5, 1e-9  # a scale at which guidance changes nothing by itself


def perturbed(model: Any, scale: float) -> Any:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, scale)[0]


def self_attention(model: Any, scale: float) -> Any:
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return SelfAttentionGuidance.execute(model, scale, 2.0)[0]


def skip_layer(model: Any, scale: float) -> Any:
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    return SkipLayerGuidanceDiT.execute(model, scale, 0.0, 1.0, "0", "0")[0]


def now_and_then(model: Any, scale: float) -> Any:
    """Two further passes, of which the first one is left out after the second step."""
    found, seen = model.clone(), set()

    def smaller(args: dict[str, Any]) -> Tensor:
        from comfy.samplers import calc_cond_batch

        seen.add(float(args["sigma"][0]))
        if len(seen) > 2:
            return args["denoised"]
        given = args["model"], [args["cond"]], 0.5 * args["input"], args["sigma"]
        (other,) = calc_cond_batch(*given, args["model_options"])
        return args["denoised"] + (args["cond_denoised"] - other) * scale

    found.set_model_sampler_post_cfg_function(smaller)
    return perturbed(found, 1.0)


GUIDED: list[tuple[str, Callable[..., Any]]] = [
    ("unet", perturbed),
    ("unet", self_attention),
    ("sd3", skip_layer),
    ("flux", skip_layer),
]
KINDS = [f"{family} {node.__name__}" for family, node in GUIDED]


class Bench:
    """A tiny MODEL, and its runs with a cache that reuses everything after the first step."""

    def __init__(self, family: str, in_comfy: Any, prompts: Any) -> None:
        self.family, self.prompts, self.model = family, prompts, in_comfy(family)

    def cached(self, model: Any) -> Any:
        from comfy_nodes.adapter import ComfyUI

        return ComfyUI().install(model, Patches(policy=LateInterval(1, 100)))

    def run(self, model: Any, sampler: str = "euler", batch: int = 1) -> Tensor:
        """The latents of one run with guidance, (B, C, 16, 16): of a sampler of one or two
        evaluations a step."""
        from comfy import sample, samplers

        sampling = model.get_model_object("model_sampling")
        sigmas = samplers.calculate_sigmas(sampling, "normal", STEPS)
        conds = [[[text, {"pooled_output": text[:, 0]}]] for text in map(self.prompts, ([0], [-1]))]
        channels = 4 if self.family == "unet" else 16
        noise = torch.randn(batch, channels, 16, 16, generator=torch.Generator().manual_seed(0))
        return sample.sample_custom(
            model, noise, 2.0, samplers.sampler_object(sampler), sigmas, *conds,
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family,node", GUIDED, ids=KINDS)
def test_a_further_pass_leaves_the_others_alone(
    family: str, node: Any, in_comfy: Any, prompts: Any
) -> None:
    """Guidance too slight to matter changes nothing, though its pass stores features too."""
    bench, sampler = Bench(family, in_comfy, prompts), "heun" if family == "unet" else "euler"
    slight = node(bench.model, SLIGHT)
    plain = bench.run(bench.model, sampler)
    assert gap(bench.run(slight, sampler), plain) < 1e-4, "without a cache"
    attached = bench.cached(bench.model)
    expected = bench.run(attached.handle, sampler)
    attached.detach()
    attached = bench.cached(slight)
    found = bench.run(attached.handle, sampler)
    run = attached.parts[-1].last
    attached.detach()
    assert gap(expected, plain) > 1e-3, "nothing was reused"
    assert gap(found, expected) < 1e-4
    assert int(run.reused.sum()) > 0 and int(run.reused[0].sum()) == 0


@pytest.mark.parametrize("family,node", GUIDED, ids=KINDS)
def test_its_streams_are_the_same_in_every_step(
    family: str, node: Any, in_comfy: Any, prompts: Any
) -> None:
    """It reuses its own features: as many rows a step, each apart from all others."""
    bench = Bench(family, in_comfy, prompts)
    attached = bench.cached(node(bench.model, 1.0))
    cache, seen = attached.parts[-1], {}
    plain = cache.observe

    def observe(*args: Any) -> None:
        plain(*args)
        seen.setdefault(cache.clock.step, []).extend(cache.clock.streams)

    cache.observe = observe
    bench.run(attached.handle, batch=2)
    attached.detach()
    assert len(seen) == STEPS and len(seen[0]) == len(set(seen[0])) == 2 * 3
    assert all(sorted(map(hash, s)) == sorted(map(hash, seen[0])) for s in seen.values())


def test_a_pass_that_comes_and_goes(in_comfy: Any, prompts: Any) -> None:
    """The one after it keeps its stream."""
    bench = Bench("unet", in_comfy, prompts)
    found = []
    for node in (lambda model: perturbed(model, 1.0), lambda model: now_and_then(model, SLIGHT)):
        attached = bench.cached(node(bench.model))
        found.append(bench.run(attached.handle))
        attached.detach()
    assert gap(found[1], found[0]) < 1e-4
