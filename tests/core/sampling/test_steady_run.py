"""A pipeline's run of which the device need not be read, and runs of which it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tenuto as tn
from tenuto.artifact import Artifact
from tenuto.sampling import clock as clock_module
from tenuto.sampling.steady_run import SteadyRun, place_in
from tests.core import tiny_pipelines as tiny

STEPS = 12
SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def pipe(one_thread: None) -> Any:
    found = tiny.stable_diffusion("StableDiffusionPipeline")
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def artifact(pipe: Any) -> Artifact:
    found = tn.record(pipe, ["a"], steps=STEPS, guidance=3.0, call=SIZE)
    return Artifact.new(pipe, found.schedule()).add_forecast(found.kernel)


def latent(pipe: Any, **options: Any) -> Tensor:
    seed = torch.Generator().manual_seed(0)
    given = {"output_type": "latent", "generator": seed, "num_inference_steps": STEPS, **SIZE}
    return pipe("a dog", **given, **options).images


def test_few_calls_are_read_and_all_are_known(
    pipe: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    read = clock_module.Clock.observe

    def counted(self: Any, timestep: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(float(timestep))
        read(self, timestep, *args, **kwargs)

    monkeypatch.setattr(clock_module.Clock, "observe", counted)
    with tn.attach(pipe, artifact, speedup=2) as attached:
        found = latent(pipe)
        assert len(seen) == 3 and attached.counts()[""] == [6, 6]
        latent(pipe)
        assert len(seen) == 6 and attached.counts()[""] == [12, 12]
        monkeypatch.setattr(SteadyRun, "find", lambda *_: None)
        assert torch.equal(latent(pipe), found)
        assert len(seen) == 18 and attached.counts()[""] == [18, 18]


def test_prompts_that_change_in_a_run_are_read(pipe: Any, artifact: Artifact) -> None:
    """Guidance that ends at step 6: fewer rows from there on, of the same image."""

    def cut(pipe: Any, step: int, time: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 5:
            pipe._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]
        return kwargs

    names = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with tn.attach(pipe, artifact, speedup=2) as attached:
        latent(pipe, guidance_scale=3.0, **names)
        assert attached.counts()[""] == [6, 6]


@pytest.mark.parametrize("first", [0, 6])
def test_images_that_take_turns_get_none_of_each_other(
    pipe: Any, artifact: Artifact, first: int
) -> None:
    """Two of one prompt, from the first step on or from a later one: the second is computed."""
    pipe.scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 16, tiny.WIDTH, generator=generator)
    own = [torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2)]

    def other(step: int, time: Tensor) -> Tensor:
        return pipe.unet(own[1] + 0.05 * step, time, states, return_dict=False)[0]

    with torch.no_grad():
        wanted = [other(step, time) for step, time in enumerate(pipe.scheduler.timesteps)]
        with tn.attach(pipe, artifact, speedup=2):
            for step, time in enumerate(pipe.scheduler.timesteps):
                pipe.unet(own[0] * (1 + 0.05 * step), time, states, return_dict=False)
                if step >= first:
                    assert torch.allclose(other(step, time), wanted[step], atol=1e-5)


def test_a_view_of_a_timestep_is_known_by_its_place() -> None:
    times = torch.arange(10.0).flip(0)
    for place, time in enumerate(times):
        assert place_in(times, time) == place_in(times, time.expand(3)) == place
        assert place_in(times, time[None]) == place
        assert place_in(times, time.clone()) is None and place_in(times, time * 1) is None
    assert place_in(times[2:], times[4]) == 2 and place_in(times[2:], times[1]) is None
    assert place_in(None, times[0]) is None and place_in(times[::2], times[0]) is None
    assert place_in(times, times[3].to(torch.float64)) is None
