"""Timesteps in host memory: the same steps, and a scheduler that is left as it was."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tenuto as tn
from tenuto.sampling import scheduler_step
from tenuto.sampling.scheduler_step import StandsIn, TimesOnHost
from tests.core import tiny_pipelines as tiny

READING = ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM")
COUNTING = ("EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers


def made(name: str) -> Any:
    found = getattr(diffusers, f"{name}Scheduler")()
    found.set_timesteps(10)
    return found


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timesteps in this machine's memory count as being elsewhere."""
    monkeypatch.setattr(scheduler_step, "_on_device", lambda times: isinstance(times, Tensor))


def run(scheduler: Any, seen: list[Any] | None = None) -> Tensor:
    """Ten steps of an output that is a part of the sample."""
    generator = torch.Generator().manual_seed(0)
    takes = inspect.signature(scheduler.step).parameters
    more = {"generator": generator} if "generator" in takes else {}
    x = torch.randn(1, 4, 8, 8, generator=generator)
    for number, t in enumerate(scheduler.timesteps):
        named = {"model_output": x * 0.1, "timestep": t, "sample": x}
        args, given = ([], named) if number % 2 else (list(named.values()), {})
        x = scheduler.step(*args, **given, **more, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", READING)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_steps_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, scheduler, on_host = run(made(name)), made(name), TimesOnHost()
    before, given = set(vars(scheduler)), []
    own = type(scheduler).step
    on_host.put(scheduler, scheduler.timesteps)

    def noted(self: Any, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        given.append(timestep)
        return own(self, model_output, timestep, *args, **kwargs)

    monkeypatch.setattr(type(scheduler), "step", noted)
    assert torch.equal(run(scheduler), expected)
    known = {t.data_ptr() for t in on_host.known}
    assert [t.data_ptr() in known for t in given] == [True] * len(scheduler.timesteps)
    x = torch.zeros(1, 4, 8, 8)
    scheduler.step(x, scheduler.timesteps[0] * 1, x)
    assert given[-1].data_ptr() not in known, "none of the run's: as it is"
    on_host.remove()
    assert set(vars(scheduler)) == before


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_counts_its_steps_is_left_alone(name: str) -> None:
    scheduler, on_host = made(name), TimesOnHost()
    on_host.put(scheduler, scheduler.timesteps)
    assert "step" not in vars(scheduler)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_who_has_the_step_already_keeps_it() -> None:
    scheduler, on_host = made("DDIM"), TimesOnHost()
    others = scheduler.__dict__["step"] = StandsIn(scheduler, scheduler.step)
    on_host.put(scheduler, scheduler.timesteps)
    on_host.remove()
    assert scheduler.step is others
    del scheduler.__dict__["step"]
    on_host.put(scheduler, scheduler.timesteps)
    ours = scheduler.step
    scheduler.__dict__["step"] = others = StandsIn(scheduler, ours)
    on_host.put(scheduler, scheduler.timesteps)
    on_host.remove()
    assert scheduler.step is others
    run(scheduler)  # ours, taken out, steps all the same


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_pipeline_has_it_while_something_is_attached() -> None:
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        seed = torch.Generator().manual_seed(0)
        size = {"height": 16, "width": 16, "num_inference_steps": 5}
        return pipe("a dog", generator=seed, output_type="latent", eta=0.5, **size).images

    expected = images()
    with tn.attach(pipe, None, speedup=1):
        assert torch.equal(images(), expected)
        assert isinstance(pipe.scheduler.step, StandsIn)
        copied = copy.deepcopy(pipe.scheduler)
        assert copied.step.__self__ is copied
        first, pipe.scheduler = pipe.scheduler, made("DDIM")
        images()
        assert "step" not in vars(first) and isinstance(pipe.scheduler.step, StandsIn)
    assert "step" not in vars(pipe.scheduler)


def test_on_a_cpu_nothing_stands_in() -> None:
    scheduler, on_host = made("DDIM"), TimesOnHost()
    on_host.put(scheduler, scheduler.timesteps)
    assert "step" not in vars(scheduler)
