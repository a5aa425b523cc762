"""Steps as they are asked for, timesteps in any form, samples that are lists: in real pipelines."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.model import Leave, Signature, times_of, watched
from tenuto.runtime import attach
from tenuto.sampling import Clock, PipelineCall
from tests.core import tiny_pipelines as tiny

SECOND = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "HeunDiscreteScheduler")

OLD = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of diffusers


@cache
def with_scheduler(kind: str, karras: bool) -> Any:
    scheduler = getattr(diffusers, kind)(
        beta_schedule="scaled_linear", use_karras_sigmas=karras, steps_offset=1
    )
    return tiny.stable_diffusion("StableDiffusionPipeline", scheduler=scheduler)


def runs_seen(handle: Any, pipe: Any, times: Any, steps: int, runs: int = 2) -> int:
    """How many runs a clock on `handle` sees while the pipeline makes `runs` of them."""
    asked, clock, seen = PipelineCall(pipe, tiny.PROMPTS, steps, 3.0), Clock(times), set[int]()
    with tiny.follow(handle, clock):
        hook = pipe.unet.register_forward_pre_hook(lambda *_: seen.add(clock.run))
        for _ in range(runs):
            asked(pipe.unet, 0, 1, "latent")
        hook.remove()
    return len(seen)


# --- steps ----------------------------------------------------------------------------------------


@OLD
@pytest.mark.parametrize("kind", SECOND)
@pytest.mark.parametrize("karras", [False, True])
def test_second_order_schedulers(kind: str, karras: bool) -> None:
    """Steps are those asked for; a run is one run, at other steps too, though noise may rise."""
    pipe, steps = with_scheduler(kind, karras), 20 if "Ancestral" in kind else 5
    trajectory = tn.record(pipe, tiny.PROMPTS[:1], steps=steps, guidance=3.0)
    assert trajectory.steps == steps
    assert steps <= len(trajectory.timesteps) <= 2 * steps
    for handle in (pipe, pipe.unet):
        assert runs_seen(handle, pipe, trajectory.timesteps, steps) == 2
        assert runs_seen(handle, pipe, trajectory.timesteps, steps + 3) == 2


@OLD
@pytest.mark.parametrize("kind", [*SECOND, "EulerDiscreteScheduler"])
def test_an_interrupted_run_is_another_one(kind: str) -> None:
    """By the pipeline's own schedule, which every run makes anew; by the samples, without it."""
    pipe = with_scheduler(kind, True)
    trajectory = tn.record(pipe, tiny.PROMPTS[:1], steps=4, guidance=3.0)
    asked, runs = PipelineCall(pipe, tiny.PROMPTS, 4, 3.0), list[int]()

    def leave(*_: Any) -> None:
        raise Leave

    for handle in (pipe, pipe.unet):
        clock = Clock(trajectory.timesteps)
        with tiny.follow(handle, clock):
            for seed in (0, 1):
                with watched(pipe.unet, before=leave), suppress(Leave):
                    asked(pipe.unet, seed, 1, "latent")
                runs.append(clock.run)
        assert runs[-2] != runs[-1]


def test_image_to_image_visits_fewer_steps_than_are_asked() -> None:
    """And compares at those: 10 steps at strength 0.8 are 8."""
    pipe = tiny.stable_diffusion("StableDiffusionImg2ImgPipeline")
    call = {"image": tiny.picture(), "strength": 0.8}
    trajectory = tn.record(pipe, tiny.PROMPTS[:1], steps=10, call=call)
    assert (trajectory.steps, len(trajectory.timesteps)) == (10, 8)
    assert trajectory.schedule()["steps"] == trajectory.about()["steps"] == 10


def test_steps_that_rounding_makes_equal_are_steps() -> None:
    """bf16 has eight bits: of 50 steps that a shift of 7 crowds, some get one timestep."""
    pipe = tiny.sd3()
    pipe.scheduler = tiny.flow(shift=7.0)
    pipe.transformer.register_forward_pre_hook(_rounded, with_kwargs=True, prepend=True)
    trajectory = tn.record(pipe, tiny.PROMPTS[:1], steps=50)
    assert trajectory.steps == 50 and len(trajectory.calls) == 50
    assert len(trajectory.timesteps) < 50
    assert all(call.timestep == trajectory.timesteps[call.row] for call in trajectory.calls)


def _rounded(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, kwargs | {"timestep": kwargs["timestep"].to(torch.bfloat16).float()}


# --- timesteps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [(7, [7]), (7.5, [7.5]), (torch.tensor(7), [7]), (torch.tensor([7, 7]), [7, 7]),
     (torch.tensor([[0, 7, 7], [0, 0, 5]]), [7, 5]), (torch.tensor([[0.0, 7.0]]), [7]),
     (torch.tensor([0.0, 7.0, 3.0]), [7]), (torch.zeros(2, 3, 2), [0, 0])],
)  # fmt: skip
def test_a_row_has_its_largest_timestep(given: Any, expected: list[float]) -> None:
    """One a token or a frame: what image-to-video keeps is at 0."""
    assert times_of(given, 2).tolist() == expected


def test_the_timestep_is_found_by_its_name() -> None:
    for kind, name in (
        ("ZImageTransformer2DModel", "t"), ("HiDreamImageTransformer2DModel", "timesteps"),
        ("WanTransformer3DModel", "timestep"), ("QwenImageTransformer2DModel", "timestep"),
    ):  # fmt: skip
        found = getattr(diffusers, kind)
        facts = Signature(found.__new__(found))  # its class alone is looked at
        assert facts.step({facts.names[0]: [torch.zeros(1)], name: 3, "sigma": None}) == 3


def test_timesteps_of_tokens_move_the_clock() -> None:
    """Wan 2.2 5B gives every token its own; the first frame's, 0, is not the step."""
    pipe = tiny.wan(expand_timesteps=True)
    given = {"prompt_embeds": tiny.embeds(2), "negative_prompt_embeds": tiny.embeds(2, seed=1)}
    call = given | tiny.SMALL | {"num_frames": 5}
    pipe.transformer.register_forward_pre_hook(_first_frame, with_kwargs=True, prepend=True)
    trajectory = tn.record(pipe, steps=4, guidance=3.0, call=call, batch=2)
    first = trajectory.calls[0].inputs["timestep"]
    assert first.ndim == 2 and int(first[0, 0]) == 0
    assert len(trajectory.timesteps) == 4 and trajectory.timesteps[0] == 1000
    rows, clock = list[int](), Clock(trajectory.timesteps)
    with tiny.follow(pipe, clock):
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: rows.append(clock.step))
        PipelineCall(pipe, (), 4, 3.0, call)(pipe.transformer, 0, 2, "latent")
        hook.remove()
    assert rows == [0, 0, 1, 1, 2, 2, 3, 3]


def _first_frame(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """As image-to-video does: the tokens of the first frame are given, their time is 0."""
    time = kwargs["timestep"].clone()
    time[:, :4] = 0
    return args, kwargs | {"timestep": time}


def test_whole_timesteps() -> None:
    """Wan's scheduler UniPC has whole ones."""
    pipe = tiny.wan()
    pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    call = {"prompt_embeds": tiny.embeds(1), **tiny.SMALL, "num_frames": 5}
    trajectory = tn.record(pipe, steps=3, guidance=1.0, call=call)
    assert trajectory.calls[0].inputs["timestep"].dtype is torch.int64
    artifact = tn.quantize(pipe, "w8a8", trajectory, temporal="none")
    assert artifact.header["schedule"]["timesteps"] == list(trajectory.timesteps)


# --- samples that are lists -----------------------------------------------------------------------


@cache
def z_image() -> tuple[Any, dict[str, Any], tn.Trajectory]:
    pipe, prompts, call = tiny.asked("z-image")
    return pipe, call, tn.record(pipe, prompts, steps=4, guidance=3.0, batch=3, call=call)


def test_a_list_has_rows() -> None:
    pipe, _, trajectory = z_image()
    facts, inputs = Signature(pipe.transformer), trajectory.calls[0].inputs
    assert isinstance(inputs["x"], list) and facts.batch(inputs) == 6
    (condition,) = facts.conditions(inputs)
    assert condition is inputs["cap_feats"]
    assert len({len(row) for row in condition}) > 1, "prompts of one length prove little"


def test_lists_replay_to_the_same_outputs() -> None:
    pipe, call, trajectory = z_image()
    outputs: list[Any] = []
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    PipelineCall(pipe, tiny.PROMPTS, 4, 3.0, call)(pipe.transformer, 0, 3, "latent")
    hook.remove()
    with torch.no_grad():
        for made, expected in zip(trajectory.calls, outputs, strict=True):
            found = pipe.transformer(**made.inputs)[0]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_clock_tells_the_rows_of_lists_apart() -> None:
    """Six streams, the same at every step, and one run each; the empty prompts are one mark."""
    pipe, call, trajectory = z_image()
    clock, seen = Clock(trajectory.timesteps), list[tuple[Any, ...]]()
    with tiny.follow(pipe.transformer, clock):
        hook = pipe.transformer.register_forward_pre_hook(
            lambda *_: seen.append((clock.run, clock.step, clock.streams))
        )
        for seed in (0, 3):
            PipelineCall(pipe, tiny.PROMPTS, 4, 3.0, call)(pipe.transformer, seed, 3, "latent")
        hook.remove()
    assert [row for _, row, _ in seen] == [0, 1, 2, 3] * 2
    assert len({run for run, _, _ in seen[:4]}) == 1 and seen[0][0] != seen[4][0]
    streams = {streams for _, _, streams in seen}
    assert len(streams) == 1
    (rows,) = streams
    assert len(set(rows)) == 6 and len({mark for mark, _ in rows}) == 4


def test_observe_reads_lists_like_tensors() -> None:
    clock = Clock((0.0, 0.5))
    x, texts = [torch.randn(4, 1, 8, 8) for _ in range(2)], [torch.randn(n, 6) for n in (5, 3)]

    def seen(time: float, sample: list[Tensor], texts: list[Tensor]) -> tuple[int, Any]:
        clock.observe(torch.full((2,), time), 2, [texts], "cpu", sample)
        return clock.run, clock.streams

    first = seen(0.0, x, texts)
    assert seen(0.5, x, [t.clone() for t in texts]) == first
    turned = [texts[0].flip(0), texts[1]]
    assert seen(0.5, x, turned)[1][0] != first[1][0] and seen(0.5, x, turned)[1][1] == first[1][1]
    again = seen(0.0, [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 6, 8)], texts)
    assert again[0] > first[0] and again[1] == first[1]


def test_a_model_of_lists_is_quantized_attached_and_compared() -> None:
    pipe, _, trajectory = z_image()
    artifact = tn.quantize(pipe, "w8a8", trajectory)
    with attach(pipe, artifact) as attached, torch.no_grad():
        low = trajectory.rollout()(pipe.transformer, 0, 2)
        assert attached.clock.step == 3
    full = trajectory.rollout()(pipe.transformer, 0, 2)
    assert 0 < (low - full).norm() / full.norm() < 0.1
    found = tn.compare(pipe, artifact, tiny.PROMPTS, count=2, batch=2)
    assert (found.steps, found.guidance, found.count) == (4, 3.0, 2)
    assert found.psnr_db["median"] > 25


def test_a_router_is_trained_on_lists() -> None:
    pipe, _, trajectory = z_image()
    artifact = tn.train_router(pipe, trajectory, reuse=0.4, iterations=2)
    assert artifact.header["schedule"]["call"] == trajectory.call
    with attach(pipe, artifact) as attached, torch.no_grad():
        trajectory.rollout()(pipe.transformer, 0, 3)
        counts = attached.counts().values()
    assert sum(reused for _, reused in counts) > 0
