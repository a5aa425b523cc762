"""A pipeline's sampling runs, one after another: none reuses features of the image before."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto import Artifact, attach, describe
from tenuto.caching import LateInterval

STEPS = 12


@pytest.fixture
def pipe(tiny: Callable[[str], Any]) -> Any:
    """FLUX, image to image: the denoiser gets the timestep divided by 1000, no view of anything."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
            mid_block_add_attention=False, shift_factor=0.0, scaling_factor=1.0,
        )  # fmt: skip
    made: Any = FluxImg2ImgPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=tiny("flux"),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def artifact(pipe: Any) -> Artifact:
    """A route that reuses everything after the first of twelve steps."""
    times = [1 - step / STEPS for step in range(STEPS)]
    branches = [b.name for b in describe(pipe.transformer).branches]
    found = Artifact.new(pipe, {"timesteps": times, "steps": STEPS, "guidance": 1.0})
    found.header["route"] = {"timesteps": times, "branches": branches}
    found.tensors["route/table"] = torch.zeros(STEPS, len(branches), dtype=torch.bool)
    found.tensors["route/table"][0] = True
    return found


def latent(pipe: Any, seed: int, strength: float = 1.0, **options: Any) -> Tensor:
    """The latent of one image; the prompt is always the same."""
    draw = torch.Generator().manual_seed(5)
    text, pooled = (torch.randn(shape, generator=draw) for shape in ((1, 5, 24), (1, 24)))
    noise = torch.Generator().manual_seed(seed)
    return pipe(
        image=torch.rand(1, 3, 16, 16, generator=noise), height=16, width=16, strength=strength,
        prompt_embeds=text, pooled_prompt_embeds=pooled, generator=noise, output_type="latent",
        **{"num_inference_steps": STEPS} | options,
    ).images  # fmt: skip


def stop(pipe: Any, step: int, t: Any, given: Any) -> Any:
    """Interrupts a pipeline after its first step."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("strength", [0.95, 0.85, 0.75])
def test_a_run_after_an_interrupted_one(
    pipe: Any, artifact: Artifact, strength: float, inference: bool
) -> None:
    """It starts later than the interrupted one, as if it went on with it."""
    with torch.inference_mode(inference):
        with attach(pipe, artifact):
            expected = latent(pipe, 1, strength)
        with attach(pipe, artifact):
            with suppress(KeyboardInterrupt):
                latent(pipe, 2, callback_on_step_end=stop)
            assert torch.equal(latent(pipe, 1, strength), expected)


@pytest.mark.parametrize("inference", [False, True])
def test_runs_of_one_step(pipe: Any, artifact: Artifact, inference: bool) -> None:
    """Each computes all: no bit differs from the plain model's."""
    with torch.inference_mode(inference):
        plain = [latent(pipe, seed, 1 / STEPS) for seed in (1, 2, 3)]
        with attach(pipe, artifact) as attached:
            found = [latent(pipe, seed, 1 / STEPS) for seed in (1, 2, 3)]
            assert all(counts == [3, 0] for counts in attached.counts().values())
    assert all(map(torch.equal, found, plain))


def test_a_whole_run_reuses_its_own_features(pipe: Any, artifact: Artifact) -> None:
    with attach(pipe, artifact) as attached:
        latent(pipe, 1)
        latent(pipe, 2)
        assert all(counts == [2, 22] for counts in attached.counts().values())


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("steps", [2, 8, 12, 15, 24, 40])
def test_runs_of_other_steps(pipe: Any, artifact: Artifact, steps: int, strength: float) -> None:
    """Each has a table for its own steps, whatever part of the noise it starts at."""
    names = tuple(artifact.header["route"]["branches"])
    made = LateInterval(3, 2)(artifact.header["route"]["timesteps"], names)
    artifact.tensors["route/table"] = made.table
    visited = steps - int(steps - steps * strength)
    with attach(pipe, artifact) as attached:
        latent(pipe, 1, strength, num_inference_steps=steps)
        computed, reused = map(sum, zip(*attached.counts().values(), strict=True))
    assert computed + reused == visited * len(names)
    share = reused / (computed + reused)
    assert share == 0 if visited < 9 else share == pytest.approx(made.reuse_ratio, abs=0.05)


def test_another_scheduler_meanwhile(pipe: Any, artifact: Artifact) -> None:
    """The pipeline's own is looked at, whichever it is; neither is changed."""
    first = pipe.scheduler
    second = type(first).from_config(first.config)
    with attach(pipe, artifact):
        expected = latent(pipe, 1, 0.75)
    kept = [set(vars(s)) for s in (first, second)]
    with attach(pipe, artifact):
        assert torch.equal(latent(pipe, 1, 0.75), expected)
        for scheduler in (second, first):
            with suppress(KeyboardInterrupt):
                latent(pipe, 2, callback_on_step_end=stop)
            pipe.scheduler = scheduler
            assert torch.equal(latent(pipe, 1, 0.75), expected)
        assert set(vars(first)) == kept[0]
    assert set(vars(second)) >= kept[1] and second.set_timesteps.__self__ is second


def test_a_copied_pipeline_follows_its_own_scheduler(pipe: Any, artifact: Artifact) -> None:
    with attach(pipe, artifact):
        expected = latent(pipe, 1, 0.75)
        for one in (copy.deepcopy(pipe), pipe):
            with suppress(KeyboardInterrupt):
                latent(one, 2, callback_on_step_end=stop)
            assert torch.equal(latent(one, 1, 0.75), expected)


def test_nothing_is_put_into_a_pipeline(pipe: Any, artifact: Artifact) -> None:
    latent(pipe, 1)  # it keeps some facts of its last run
    before = dict(vars(pipe)), set(vars(pipe.scheduler))
    with attach(pipe, artifact):
        assert (dict(vars(pipe)), set(vars(pipe.scheduler))) == before


def test_a_copy_in_another_thread(
    tiny: Callable[[str], nn.Module], kind: str, loop: Any, recorded: Any
) -> None:
    """A model and its deep copy at once: each has the images that it has alone."""
    model = tiny(kind)
    artifact = tn.quantize(model, tn.schemes.W8A8_STATIC, recorded(kind), temporal="table")
    sample, found = loop(kind), {}
    with tn.attach(model, artifact, execution="int8"), torch.no_grad():
        twin = copy.deepcopy(model)
        alone = [sample(model, seed, 1) for seed in (1, 2)]

        def work(name: int, denoiser: nn.Module) -> None:
            with torch.no_grad():
                found[name] = [sample(denoiser, name, 1) for _ in range(4)]

        threads = [threading.Thread(target=work, args=p) for p in ((1, model), (2, twin))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(x, alone[0]) for x in found[1])
    assert all(torch.equal(x, alone[1]) for x in found[2])
