"""Recording: nothing is changed, nothing is lost, and everything can be run again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import record
from tenuto.errors import Cancelled, ModelError, TenutoError
from tenuto.sampling.record import recording, sampler, to_device

PROMPTS = ("a photo of the goldfish", "a red school bus", "lemon on table", "dog in snow", "cat")


@pytest.fixture(scope="module")
def pipe(tiny_pixart_folder: Path) -> Any:
    """The tiny pipeline, loaded once; tests leave it as it is."""
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline.from_pretrained(tiny_pixart_folder)


def test_the_denoiser_is_left_as_it_was(tiny: Any, kind: str, loop: Any, bits: Any) -> None:
    denoiser = tiny(kind)
    denoiser.train()
    next(denoiser.parameters()).requires_grad_(False)
    before = bits(denoiser)
    record(denoiser, sample=loop(kind), batch=1, runs=1)
    assert bits(denoiser) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Cancelled])
def test_left_as_it_was_after_a_failure(tiny: Any, loop: Any, bits: Any, error: Any) -> None:
    denoiser = tiny("dit").train()
    before = bits(denoiser)

    def broken(module: nn.Module, seed: int, batch: int) -> Tensor:
        loop("dit", steps=2)(module, seed, batch)
        raise error

    with pytest.raises(error):
        record(denoiser, sample=broken)
    assert bits(denoiser) == before


def test_inputs_replay_to_the_same_outputs(tiny: Any, kind: str, loop: Any) -> None:
    denoiser, seen = tiny(kind), []
    hook = denoiser.register_forward_hook(lambda m, a, out: seen.append(out))
    trajectory = record(denoiser, sample=loop(kind), batch=2, runs=2)
    hook.remove()
    assert len(trajectory.calls) == len(seen) == 2 * 4
    with torch.no_grad():
        for call, expected in zip(trajectory.calls, seen, strict=True):
            found = denoiser(**call.inputs)
            one, other = (o if isinstance(o, Tensor) else o[0] for o in (found, expected))
            assert torch.equal(one, other)


def test_steps_come_in_executed_order(recorded: Any, loop: Any, kind: str) -> None:
    trajectory = recorded(kind)
    assert trajectory.timesteps == tuple(loop(kind).times().tolist())
    assert trajectory.steps == 4 and trajectory.runs == 2 and trajectory.batch == 2
    assert [(c.run, c.row) for c in trajectory.calls] == [(r, i) for r in (0, 1) for i in range(4)]
    assert all(c.timestep == trajectory.timesteps[c.row] for c in trajectory.calls)


def test_split_halves_and_second_order(recorded: Any) -> None:
    split = recorded("dit", split=True)
    assert [c.row for c in split.calls if c.run == 0] == [0, 0, 1, 1, 2, 2, 3, 3]
    heun = recorded("dit", heun=True)
    assert [c.row for c in heun.calls if c.run == 0] == [0, 1, 1, 2, 2, 3, 3]
    assert heun.timesteps == split.timesteps


def test_recording_is_a_copy(tiny: Any, call_as: Any, conditions: Any) -> None:
    """What the loop writes to its tensors afterwards does not reach the recording."""
    denoiser, calls = tiny("dit"), []
    x = torch.ones(1, 3, 8, 8)
    with recording(denoiser, calls), torch.no_grad():
        call_as("dit", denoiser, x, torch.tensor(5), conditions("dit", [1]))
    x.zero_()
    assert calls[0].inputs["hidden_states"].eq(1).all()


def test_recording_does_not_change_what_is_drawn(tiny: Any, kind: str, loop: Any) -> None:
    denoiser, run = tiny(kind), loop(kind)
    drawn: list[Tensor] = []

    def sample(module: nn.Module, seed: int, batch: int) -> Tensor:
        drawn.append(run(module, seed, batch))
        return drawn[-1]

    record(denoiser, sample=sample, batch=2, runs=1, seed=3)
    with torch.no_grad():
        assert torch.equal(drawn[0], run(denoiser, 3, 2))


def test_progress_and_stop(tiny: Any, loop: Any, bits: Any) -> None:
    denoiser, notes = tiny("dit"), []
    before = bits(denoiser)
    record(
        denoiser, sample=loop("dit", steps=1), runs=3, on_progress=lambda *note: notes.append(note)
    )
    assert [(done, total) for done, total, _ in notes] == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def stop(done: int, total: int, note: str) -> None:
        if done == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        record(denoiser, sample=loop("dit", steps=1), runs=3, on_progress=stop)
    assert bits(denoiser) == before


def test_what_cannot_be_recorded_is_said(tiny: Any, loop: Any, pipe: Any) -> None:
    denoiser = tiny("dit")
    with pytest.raises(TenutoError, match="sample="):
        record(denoiser)
    with pytest.raises(ModelError, match="did not call"):
        record(denoiser, sample=lambda d, seed, batch: torch.zeros(batch, 3, 8, 8))
    with pytest.raises(ModelError, match="transformer"):
        record(object(), PROMPTS)
    with pytest.raises(TenutoError, match="prompt"):
        record(pipe)
    with pytest.raises(TenutoError, match="step"):
        record(pipe, PROMPTS, steps=0)
    with pytest.raises(TenutoError, match="batch"):
        record(denoiser, sample=loop("dit"), batch=0)


def test_a_copied_denoiser_is_recorded_through_what_it_is_given(tiny: Any, loop: Any) -> None:
    """`sample` gets the denoiser: one that runs another is found out."""
    denoiser = tiny("dit")
    other = copy.deepcopy(denoiser)
    with pytest.raises(ModelError):
        record(denoiser, sample=lambda d, seed, batch: loop("dit")(other, seed, batch))


def test_about_is_plain_and_tells_recordings_apart(recorded: Any) -> None:
    about = recorded("dit").about()
    assert json.loads(json.dumps(about)) == about
    assert about != recorded("dit", steps=3).about()


def test_tensors_move_wherever_they_are() -> None:
    nested = {"a": [torch.ones(2), (torch.zeros(1, dtype=torch.float16), "text", None)], "b": 3}
    moved = to_device(nested, "cpu", torch.float32)
    assert moved["a"][1][0].dtype is torch.float32 and isinstance(moved["a"][1], tuple)
    assert moved["a"][1][1:] == ("text", None) and moved["b"] == 3
    assert nested["a"][1][0].dtype is torch.float16


# --- pipelines ------------------------------------------------------------------------------------


def test_a_picture_is_a_function_of_seed_plus_place(pipe: Any) -> None:
    """Image i of a call is image i - 1 of the call with the next seed, in any batch."""
    sample = sampler(pipe, PROMPTS[:3], 2, 2.0)
    with torch.no_grad():
        whole = sample(pipe.transformer, 4, 4)
        parts = [sample(pipe.transformer, 4 + i, 1) for i in range(4)]
    assert whole.shape == (4, 3, 32, 32) and whole.dtype is torch.float32
    assert whole.min() >= -1 and whole.max() <= 1 and whole.min() < -0.01
    for i, part in enumerate(parts):
        assert torch.allclose(whole[i], part[0], atol=1e-5)
    assert not torch.allclose(whole[0], whole[3], atol=1e-2), (
        "prompt 4 and 7 are the same, noise not"
    )


def test_the_pipeline_is_left_as_it_was(pipe: Any, bits: Any) -> None:
    before, attributes = bits(pipe.transformer), dict(vars(pipe))
    config = dict(vars(pipe).get("_progress_bar_config", {}))
    trajectory = record(pipe, PROMPTS[:2], steps=2, guidance=2.0, batch=2)
    assert bits(pipe.transformer) == before
    assert vars(pipe).keys() == attributes.keys()
    assert all(vars(pipe)[k] is v for k, v in attributes.items())
    assert vars(pipe).get("_progress_bar_config", {}) == config
    assert len(trajectory.calls) == 2
    assert trajectory.calls[0].inputs["hidden_states"].shape[0] == 4, "both halves of guidance"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_pipeline_gets_its_denoiser_back(pipe: Any, error: Any) -> None:
    """`sample` puts another one in; whatever happens, it does not stay."""
    own = pipe.transformer
    pipe.set_progress_bar_config(desc="mine")
    other = copy.deepcopy(own)

    def fail(module: nn.Module, args: Any) -> None:
        raise error

    other.register_forward_pre_hook(fail)
    with pytest.raises(error):
        sampler(pipe, PROMPTS, 2, 2.0)(other, 0, 1)
    assert pipe.transformer is own
    assert pipe._progress_bar_config == {"desc": "mine"}
    del pipe._progress_bar_config


def test_another_denoiser_draws_other_pictures(pipe: Any) -> None:
    other = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
        sample = sampler(pipe, PROMPTS, 2, 2.0)
        assert not torch.allclose(sample(pipe.transformer, 0, 1), sample(other, 0, 1), atol=1e-3)


def test_latents_instead_of_pictures(pipe: Any) -> None:
    with torch.no_grad():
        latents = sampler(pipe, PROMPTS, 2, 2.0, output="latent")(pipe.transformer, 0, 2)
    assert latents.shape == (2, 4, 8, 8)


def test_every_prompt_is_drawn(pipe: Any) -> None:
    """Five prompts in batches of two: none is left out, and none is generated twice."""
    trajectory = record(pipe, PROMPTS, steps=1, guidance=1.0, batch=2)
    rows = torch.cat([c.inputs["encoder_hidden_states"].flatten(1) for c in trajectory.calls])
    assert len(rows) == len(PROMPTS)
    assert len(rows.unique(dim=0)) == len(PROMPTS)


def test_one_prompt_is_not_its_letters(pipe: Any) -> None:
    trajectory = record(pipe, "a red school bus", steps=1, guidance=1.0)
    assert trajectory.prompts == ("a red school bus",)
    assert trajectory.batch == 1


def test_a_rollout_is_what_was_recorded(pipe: Any) -> None:
    """Router training runs the trajectory again; a pipeline gives latents for it."""
    trajectory = record(pipe, PROMPTS[:2], steps=2, guidance=2.0, batch=2)
    calls: list[Any] = []
    with recording(pipe.transformer, calls), torch.no_grad():
        out = trajectory.rollout()(pipe.transformer, trajectory.seed, trajectory.batch)
    assert out.shape == (2, 4, 8, 8)
    for new, old in zip(calls, trajectory.calls, strict=True):
        assert torch.equal(new.inputs["hidden_states"], old.inputs["hidden_states"])
    trajectory.sample = trajectory.latent = None
    with pytest.raises(TenutoError, match="sample="):
        trajectory.rollout()


class Keys:
    """A model's own cache: of an object that whoever made it empties after the run."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = [torch.ones(2, 3)]


def test_what_a_models_own_cache_held_is_kept() -> None:
    """As FLUX.2 klein's keys of reference images, which its pipeline clears at the end."""

    class Reading(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, cache: Keys) -> tuple[Tensor]:
            return (sample * cache.rows[0].sum(),)

    model, cache, calls = Reading(), Keys(), []
    with recording(model, calls):
        for time in (2.0, 1.0):
            model(torch.ones(1, 1), torch.tensor(time), cache)
    cache.rows.clear()
    first, second = (call.inputs["cache"].rows[0] for call in calls)
    assert first is second and bool((first == 1).all())
    assert model(**to_device(calls[0].inputs, "cpu"))[0] == 6.0
