"""Caches of diffusers and ControlNets beside an artifact: no copy runs another's blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.errors import ModelError
from tenuto.model import denoiser_of, private_copy
from tests.core import tiny_pipelines as small
from tests.core.beside import drawn, gap, route

CACHES = ("FirstBlockCache", "MagCache", "TaylorSeerCache", "PyramidAttentionBroadcast",
          "FasterCache")  # fmt: skip


def options(cache: str) -> dict[str, Any]:
    """Of the configuration of a cache of diffusers."""
    spatial = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 1001),
        "current_timestep_callback": lambda: 500,
    }
    return {
        "FirstBlockCache": {"threshold": 0.5},
        "MagCache": {"mag_ratios": torch.ones(4), "num_inference_steps": 4},
        "TaylorSeerCache": {"cache_interval": 2, "disable_cache_before_step": 1},
        "PyramidAttentionBroadcast": spatial,
        "FasterCache": spatial | {"tensor_format": "BCHW", "is_guidance_distilled": True},
    }[cache]


def enable(model: Any, cache: str) -> None:
    """A cache of diffusers on `model`."""
    config = getattr(diffusers, f"{cache}Config")
    model.enable_cache(config(**options(cache)))


# --- caches of diffusers --------------------------------------------------------------------------


@pytest.mark.parametrize("under", [False, True], ids=["", "attached"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_private_copy_runs_its_own_blocks(
    tiny: Callable[[str], nn.Module], loop: Any, cache: str, under: bool
) -> None:
    """Whatever is changed in it, it computes as a model of its weights without a cache."""
    model, plain = tiny("flux"), tiny("flux")
    enable(model, cache)
    attached = tn.attach(model, tn.schemes.W8A16, simulate=True) if under else None
    twin, reference = private_copy(model), plain
    if under:
        tn.attach(plain, tn.schemes.W8A16, simulate=True)
    for one in (twin, reference):
        for name, parameter in one.named_parameters():
            if "bias" in name:
                parameter.data += 1.0
    assert torch.equal(drawn(loop, "flux", twin), drawn(loop, "flux", reference))
    assert not any("_diffusers_hook" in vars(m) for m in twin.modules())
    assert model.is_cache_enabled, "the user's model lost its cache"
    if attached is not None:
        attached.detach()


@pytest.mark.parametrize("cache", ["FirstBlockCache", "MagCache", "TaylorSeerCache"])
def test_quantize_with_a_cache_on(
    tiny: Callable[[str], nn.Module], recorded: Any, cache: str
) -> None:
    """Every tensor is that of the model without it."""
    model, trajectory = tiny("flux"), recorded("flux")
    expected = tn.quantize(tiny("flux"), tn.schemes.W4A8, trajectory, rounding="gptq")
    enable(model, cache)
    found = tn.quantize(model, tn.schemes.W4A8, trajectory, rounding="gptq")
    assert found.tensors.keys() == expected.tensors.keys()
    assert not [k for k, v in found.tensors.items() if not torch.equal(v, expected.tensors[k])]


def test_what_a_cache_makes_meaningless_is_refused(
    tiny: Callable[[str], nn.Module], recorded: Any, loop: Any, bits: Any
) -> None:
    """A route, a search for one, a comparison: in one sentence, before anything is changed."""
    model, trajectory = tiny("flux"), recorded("flux")
    artifact = tn.quantize(model, tn.schemes.W8A8, trajectory)
    artifact |= route(model, trajectory)
    enable(model, "TaylorSeerCache")
    before = bits(model)
    for ask in (
        lambda: tn.attach(model, artifact),
        lambda: tn.train_router(model, trajectory, speedup=1.5),
        lambda: tn.compare(model, artifact, sample=loop("flux"), count=2),
    ):
        with pytest.raises(ModelError, match=r"TaylorSeerCache .* disable_cache\(\)"):
            ask()
    assert bits(model) == before
    tn.attach(model, artifact, route=False).detach()
    assert bits(model) == before


# --- a ControlNet ---------------------------------------------------------------------------------


def controlled(kind: str) -> Any:
    """A pipeline with a ControlNet that does something, and its call."""
    import diffusers

    if kind == "sd":
        pipe = small.stable_diffusion("StableDiffusionPipeline")
        net = small.randomized(
            diffusers.ControlNetModel.from_unet(
                pipe.unet, conditioning_embedding_out_channels=(4, 8, 8)
            )
        )
        return diffusers.StableDiffusionControlNetPipeline(
            **pipe.components, controlnet=net, requires_safety_checker=False
        ), {"image": torch.rand(1, 3, 32, 32)}
    assert kind == "sd3"
    pipe = small.sd3()
    net = small.randomized(
        diffusers.SD3ControlNetModel.from_transformer(
            pipe.transformer, num_layers=1, num_extra_conditioning_channels=0
        )
    )
    made = diffusers.StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=net)
    return made, {"control_image": torch.rand(1, 3, 32, 32)}


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_controlnet_does_not_change_what_is_reused(kind: str) -> None:
    """Its residuals differ at every step: they are not who an image is."""
    pipe, call = controlled(kind)
    pipe.set_progress_bar_config(disable=True)
    trajectory = tn.record(pipe, ["a dog", "two cats"], steps=4, guidance=3.0, call=call, batch=1)
    with tn.attach(pipe, route(pipe, trajectory)) as attached:
        found = trajectory.rollout()(denoiser_of(pipe), 0, 2)
        assert all(counts == [1, 3] for counts in attached.counts().values())
        streams = attached.clock.streams
    assert len(set(streams)) == 4, "the halves of guidance are apart"
    alone = torch.cat([one_image(pipe, trajectory, seed) for seed in (0, 1)])
    if kind == "sd":  # the other's own pipeline draws the latent of the picture anew each time
        assert gap(found, alone) < 1e-3, "an image depends on the one beside it"


def one_image(pipe: Any, trajectory: Any, seed: int) -> Tensor:
    """The latent of one image, both halves of guidance beside each other."""
    with tn.attach(pipe, route(pipe, trajectory)):
        return trajectory.rollout()(denoiser_of(pipe), seed, 1)


# --- further passes of one step -------------------------------------------------------------------


def guided(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """(pipeline, the plain one, call): guidance by a pass that leaves something out."""
    import diffusers

    if kind == "skip-layer":
        pipe = small.sd3()
        places = {"skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
        return pipe, pipe, {"skip_guidance_layers": [0]} | places
    plain = small.stable_diffusion("StableDiffusionPipeline")
    parts = plain.components | {"requires_safety_checker": False}
    pag = diffusers.StableDiffusionPAGPipeline(**parts, pag_applied_layers=["mid"])
    return pag, plain, {"pag_scale": 3.0}


@pytest.mark.parametrize("kind", ["skip-layer", "perturbed"])
def test_a_further_pass_has_features_of_its_own(kind: str) -> None:
    """It is another stream in the same step, and the same one in every step."""
    pipe, plain, call = guided(kind)
    pipe.set_progress_bar_config(disable=True)
    trajectory = tn.record(plain, ["a dog", "two cats"], steps=3, guidance=3.0)
    seen: list[tuple[Any, ...]] = []
    with tn.attach(pipe, route(pipe, trajectory)) as attached:
        denoiser = denoiser_of(pipe)
        hook = denoiser.register_forward_pre_hook(lambda *_: seen.append(attached.clock.streams))
        pipe("a dog", num_inference_steps=3, output_type="latent", guidance_scale=3.0, **call)
        hook.remove()
        passes = len(seen) // 3
        assert list(attached.counts().values())[-1] == [passes, 2 * passes]
    steps = [[s for one in seen[i : i + passes] for s in one] for i in range(0, len(seen), passes)]
    assert steps[0] == steps[1] == steps[2]
    assert len(steps[0]) == len(set(steps[0])) == 3
