"""Names, files and prompts where calibration wants schemes, artifacts and recordings."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tenuto as tn
from tenuto.calibration import effort, prompts_needed
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.model import watched
from tenuto.numerics import Recipe, Rule, named
from tenuto.sampling import encoder_calls
from tenuto.sampling.record import recording
from tests.core import tiny_pipelines as tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def pipe() -> Any:
    return tiny.sd3()


@cache
def trajectory() -> tn.Trajectory:
    return tn.record(pipe(), tiny.PROMPTS, steps=3, batch=2)


def same(one: tn.Artifact, other: tn.Artifact) -> bool:
    """Bit by bit, but for the forecast: its kernel is of as many images as were recorded."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.tensors[key], other.tensors[key])
        for key in one.tensors
        if not key.startswith("forecast/")
    )


# --- a name, a file, prompts ----------------------------------------------------------------------


def test_a_scheme_by_its_name() -> None:
    found = tn.quantize(pipe(), "W8A8", trajectory())
    assert same(found, tn.quantize(pipe(), tn.schemes.W8A8, trajectory()))
    with pytest.raises(tn.SchemeError, match="Unknown scheme 'w9a9': choose one of"):
        tn.quantize(pipe(), "w9a9", trajectory())
    with pytest.raises(tn.SchemeError, match="A scheme, its name or a recipe is expected, not a"):
        tn.quantize(pipe(), 8, trajectory())  # type: ignore[arg-type]


def test_an_artifact_by_its_file(tmp_path: Path) -> None:
    made = tn.quantize(pipe(), "w8a8", trajectory())
    file = tmp_path / "a.safetensors"
    made.save(file)
    with tn.attach(pipe(), str(file)) as attached:
        assert same(attached.artifact, made)
    found = tn.compare(pipe(), file, tiny.PROMPTS[:1], count=1)
    assert found.psnr_db["median"] > 25
    routes = [
        tn.train_router(pipe(), trajectory(), reuse=0.5, iterations=1, artifact=artifact)
        for artifact in (file, made)
    ]
    assert same(*routes)
    for function in (tn.attach, tn.compare):
        with pytest.raises(tn.ArtifactError, match="An artifact or its file is expected, not"):
            function(pipe(), [made])  # type: ignore[arg-type]
    with pytest.raises(tn.ArtifactError, match="Cannot read"):
        tn.attach(pipe(), tmp_path / "none.safetensors")


def test_prompts_are_recorded(tmp_path: Path) -> None:
    """With the pipeline's own steps: as many as the scheme needs, or the steps of the artifact."""
    (tmp_path / "tenuto.json").write_text('{"steps": 3}')
    mine = tiny.sd3()
    mine.register_to_config(_name_or_path=str(tmp_path))
    prompts = [f"dog {n}" for n in range(9)]
    found = tn.quantize(mine, "w8a8", prompts)
    known = tn.record(mine, prompts[:4], steps=3, batch=4)
    assert found.header["made"]["calibration"] == known.about()
    assert same(found, tn.quantize(mine, "w8a8", known))
    route = tn.train_router(mine, prompts, reuse=0.5, iterations=1, artifact=found)
    assert route.header["schedule"] == found.header["schedule"]


@pytest.mark.parametrize(
    "given", [None, "a dog", [], [3], {"a": 1}, Path("prompts.txt"), torch.ones(2)]
)
def test_what_is_no_recording_is_said(given: Any) -> None:
    for made in (
        lambda: tn.quantize(pipe(), "w8a8", given),
        lambda: tn.train_router(pipe(), given),
    ):
        with pytest.raises(
            tn.TenutoError, match=r"A recording is expected, record\(model, prompts"
        ):
            made()


def test_a_bare_denoiser_takes_no_prompts() -> None:
    with pytest.raises(tn.TenutoError, match="A bare denoiser takes no prompts"):
        tn.quantize(pipe().transformer, "w8a8", ["a dog"])


# --- how many prompts are recorded ----------------------------------------------------------------


def test_a_recipe_says_how_many_prompts_it_needs() -> None:
    """One batch, where nothing is rounded on inputs and no range is stored."""
    quick, schemes = effort("quick"), tn.schemes
    for scheme in (schemes.W8A8, schemes.W8A16):
        assert prompts_needed(scheme, quick) == quick.batch == 4
    assert prompts_needed(schemes.W4A16, quick, "nearest") == quick.batch
    static = named("w8a8-static")
    for scheme in (schemes.W4A8, schemes.W4A16, static):
        assert prompts_needed(scheme, quick) == quick.prompts == 16
    assert prompts_needed(Recipe((Rule("*", schemes.W8A8),)), quick) == quick.batch
    assert prompts_needed(Recipe((Rule("*", schemes.W8A8, GPTQ()),)), quick) == quick.prompts
    assert prompts_needed(Recipe((Rule("*", static), Rule("x", None))), quick) == quick.prompts


@pytest.mark.parametrize(
    ("kind", "temporal"), [("sd3", "auto"), ("sd", "tiar"), ("z-image", "none")]
)
def test_one_run_gives_the_same_bits(kind: str, temporal: str) -> None:
    """What more runs would add is not used."""
    mine, prompts, call = tiny.asked(kind)
    assert prompts is not None
    several = tn.record(mine, [*prompts, "a lemon", "a cat"], steps=3, batch=2, call=call)
    one = tn.record(mine, prompts[:2], steps=3, batch=2, call=call)
    assert several.runs == 3 and one.runs == 1
    made = [tn.quantize(mine, "w8a8", t, temporal=temporal) for t in (several, one)]
    assert same(*made)


# --- text encoders --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flux", "img2img", "sd3"])
def test_an_encoders_artifact_has_the_schedule_of_the_pipeline(kind: str) -> None:
    """A shift by size, a strength: what its own call does, at the price of one denoiser call."""
    mine, prompts, call = tiny.asked(kind)
    assert prompts is not None
    blocks, calls = list[Any](), list[Any]()
    first = "down_blocks.0" if kind == "img2img" else "transformer_blocks.0"
    denoiser = mine.unet if kind == "img2img" else mine.transformer
    with watched(denoiser, [first], before=lambda *_: blocks.append(1)), recording(denoiser, calls):
        found = tn.quantize_encoder(
            mine, "w8", prompts, method="rtn", steps=4, guidance=3.0, call=call
        )  # fmt: skip
    trajectory = tn.record(mine, prompts[:1], steps=4, guidance=3.0, call=call)
    assert found.header["schedule"] == trajectory.schedule()
    assert len(blocks) == 1 < len(trajectory.timesteps) <= len(calls)
    assert found.header["encoders"]
    whole = tn.quantize(mine, "w8a8", trajectory) | found
    again = {name: value for name, value in call.items() if name == "image"}
    assert tn.compare(mine, whole, prompts, count=1, call=again).encoders


def test_every_prompt_reaches_an_encoder_beside_an_image() -> None:
    """Images are made one at a time there; each prompt and the empty one are encoded still."""
    mine, prompts, call = tiny.asked("img2img")
    assert prompts is not None
    calls = encoder_calls(mine, prompts, call=call, steps=4)["text_encoder"]
    assert sum(len(c.inputs["input_ids"]) for c in calls) == len(prompts) + 1
