"""What ships: the demo models, the prompts, and the sheet that `tenuto demo` makes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tenuto import cli
from tenuto.calibration.quantize import quantize
from tenuto.calibration.train_router import train_router
from tenuto.cli import commands
from tenuto.cli.side_by_side import GAIN
from tenuto.errors import ModelError, TenutoError
from tenuto.measure.compare import BF16, FULL, compare, compare_all
from tenuto.measure.sheet import EDGE, GAP, LABEL
from tenuto.model.parts import denoiser_of
from tenuto.numerics.scheme import schemes
from tenuto.resume import Work
from tenuto.runtime.attachment import attach
from tenuto.sampling.loading import LISTS, Defaults, check_model, defaults, demo, load, prompts
from tenuto.sampling.record import record, sampler
from tenuto.sampling.trajectory import Call, Trajectory

SHOWCASE = importlib.import_module("tenuto.cli.demo")
ASSETS = Path(__file__).resolve().parents[3] / "assets"
LINES = ("a red dog", "a blue cat on snow")
SHOWN = ("a lemon", "a school bus")
PIPELINES = {"transformer": "PixArtAlphaPipeline", "unet": "StableDiffusionPipeline"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe(tiny_pixart_folder: Path) -> Any:
    return load(str(tiny_pixart_folder))


def recorded(pipe: Any) -> Trajectory:
    return record(pipe, LINES, steps=4, guidance=2.0, batch=2)


# --- models and prompts ---------------------------------------------------------------------------


def test_prompt_lists_name_other_things() -> None:
    lists = {name: prompts(name) for name in LISTS}
    for name, lines in lists.items():
        assert len(lines) >= 64, name
        assert len(set(lines)) == len(lines) and all(line.strip() == line for line in lines)
    assert not set(lists["default"]) & set(lists["evaluation"])
    with pytest.raises(TenutoError, match="default, evaluation, general"):
        prompts("secret")


def test_defaults_come_from_the_folder(tiny_pixart_folder: Path, pipe: Any, tmp_path: Path) -> None:
    assert defaults(str(tiny_pixart_folder)) == defaults(pipe) == Defaults(4, 2.0)
    assert defaults(str(tmp_path)) == defaults("someone/something") == Defaults(20, None)
    for wrong in ('{"steps": [', '{"steps": 0}', '{"guidance": 1e999}', "[]", '{"steps": "many"}'):
        (tmp_path / "tenuto.json").write_text(wrong)
        with pytest.raises(ModelError, match=r"tenuto\.json is not readable"):
            defaults(tmp_path)


def test_a_model_is_a_demo_a_folder_or_a_hub_id(tiny_pixart_folder: Path) -> None:
    check_model(str(tiny_pixart_folder))
    check_model("someone/something-1.5")
    for wrong in ("demo:", "demo:nothing", "/none/there", "none", "a/b/c", "../x", str(ASSETS)):
        with pytest.raises(ModelError):
            check_model(wrong)
    with pytest.raises(ModelError, match="no demo model 'nothing'"):
        demo("nothing")


def test_load_gives_what_is_asked(tiny_pixart_folder: Path, pipe: Any) -> None:
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
    half = load(str(tiny_pixart_folder), "cpu", torch.bfloat16)
    assert half.transformer.dtype is half.text_encoder.dtype is torch.bfloat16


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def shipped(request: pytest.FixtureRequest) -> Any:
    """Each demo model in turn, in fp32."""
    return demo(request.param)


@pytest.fixture(scope="module")
def seen(shipped: Any) -> Trajectory:
    """Two steps of two images of each demo model."""
    return record(shipped, SHOWN, steps=2, guidance=defaults(shipped).guidance, batch=2)


def test_the_demo_models_draw(shipped: Any) -> None:
    """In fp32, from the installed files, at the shipped guidance; twice the same."""
    assert type(shipped).__name__ in PIPELINES.values()
    denoiser = denoiser_of(shipped)
    for part in (denoiser, shipped.text_encoder, shipped.vae):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert all(p.isfinite().all() for p in part.parameters())
    steps, guidance = defaults(shipped)
    assert steps == 20 and guidance is not None and guidance >= 2
    sample = sampler(shipped, SHOWN, 5, guidance)
    pictures = sample(denoiser, 0, 2)
    assert pictures.shape == (2, 3, 64, 64)
    red, _, blue = pictures[0, :, 20:44, 20:44].mean((1, 2)).tolist()
    assert red > blue, "a lemon is yellow"
    assert torch.equal(sample(denoiser, 0, 2), pictures)


def test_a_demo_model_by_name_is_the_model() -> None:
    assert set(PIPELINES) == {"transformer", "unet"}
    for name, kind in PIPELINES.items():
        check_model(f"demo:{name}")
        assert defaults(f"demo:{name}") == defaults(ASSETS / f"demo-{name}")
        assert type(load(f"demo:{name}")).__name__ == kind


@pytest.mark.parametrize("name", PIPELINES)
def test_the_command_draws_with_a_demo_model(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.png"
    arguments = ["generate", f"demo:{name}", "--prompt", "a lemon", "--steps", "2"]
    assert cli.main([*arguments, "--device", "cpu", "--out", str(out)]) == 0
    assert not capfd.readouterr().err
    with Image.open(out) as picture:
        assert picture.size == (64, 64)
        assert json.loads(picture.info["tenuto"])["guidance"] == defaults(f"demo:{name}").guidance


def rows(call: Call, part: list[int], batch: int) -> Call:
    """The rows `part` of a call of `batch`."""
    inputs = {
        name: value[part] if getattr(value, "shape", ())[:1] == (batch,) else value
        for name, value in call.inputs.items()
    }
    return Call(call.run, call.row, call.timestep, inputs)


def outputs(model: torch.nn.Module, calls: list[Call]) -> list[torch.Tensor]:
    """What the denoiser answers to recorded calls."""
    with torch.no_grad():
        return [model(**(c.inputs | {"return_dict": False}))[0] for c in calls]


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


def test_a_quick_artifact_fits_and_comes_off(shipped: Any, seen: Trajectory) -> None:
    """Attached: close, in int8, and batched equals split. Detached: not a bit has changed."""
    model = denoiser_of(shipped)
    whole, parts = seen.calls, ([0, 1], [3, 2])
    assert {len(next(iter(c.inputs.values()))) for c in whole} == {4}, "guidance doubles the batch"
    before = outputs(model, whole)
    artifact = quantize(shipped, schemes.W8A8, seen)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, whole), before, strict=True))
    with attach(shipped, artifact, execution="int8") as attached:
        assert attached.execution()["mode"] == "int8"
        after = outputs(model, whole)
        for part in parts:
            some = outputs(model, [rows(call, part, 4) for call in whole])
            assert max(gap(a, b[part]) for a, b in zip(some, after, strict=True)) <= 1e-3
        assert sampler(shipped, SHOWN, 2, 2.0)(model, 0, 1).shape == (1, 3, 64, 64)
    assert 0 < max(gap(a, b) for a, b in zip(after, before, strict=True)) < 0.1
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, whole), before, strict=True))
    for part in parts:
        some = outputs(model, [rows(call, part, 4) for call in whole])
        assert max(gap(a, b[part]) for a, b in zip(some, before, strict=True)) < 3e-6


def test_a_route_fits_a_demo_model(shipped: Any, seen: Trajectory) -> None:
    route = train_router(shipped, seen, reuse=0.25, iterations=1)
    model = denoiser_of(shipped)
    with attach(shipped, route) as attached:
        sampler(shipped, SHOWN, 2, 2.0)(model, 0, 1)
        assert sum(held for _, held in attached.counts().values()) > 0


# --- a recording on disk --------------------------------------------------------------------------


def test_a_kept_recording_is_the_recording(pipe: Any, tmp_path: Path) -> None:
    from tenuto.sampling.storage import keep, kept

    first = recorded(pipe)
    work = Work(tmp_path / "w", {"job": "x"})
    assert kept(work, pipe, LINES, 4, 2.0) is None
    assert keep(work, first)
    again = kept(work, pipe, LINES, 4, 2.0)
    assert again is not None and again.about() == first.about()
    for one, other in zip(first.calls, again.calls, strict=True):
        assert (one.run, one.row, one.timestep) == (other.run, other.row, other.timestep)
        assert one.inputs.keys() == other.inputs.keys()
        for name, value in one.inputs.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, other.inputs[name]), name
    assert again.sample is not None and first.sample is not None
    assert torch.equal(again.sample(pipe.transformer, 7, 1), first.sample(pipe.transformer, 7, 1))
    size = sum(f.stat().st_size for f in (tmp_path / "w").iterdir())
    whole = sum(
        v.nbytes for c in first.calls for v in c.inputs.values() if isinstance(v, torch.Tensor)
    )
    assert size < whole, "what recurs is stored once"


def test_a_recording_of_strange_things_is_not_kept(tmp_path: Path) -> None:
    from tenuto.sampling.storage import keep

    work = Work(tmp_path / "w", {})
    nested = {"x": (torch.ones(2), [None, {"k": torch.ones(2)}]), "y": 1.5}
    assert keep(work, Trajectory((1.0,), [Call(0, 0, 1.0, nested)], 0, 1, 1, 1))
    strange = {"x": object()}
    assert not keep(work, Trajectory((1.0,), [Call(0, 0, 1.0, strange)], 0, 1, 1, 1))


# --- several artifacts at once, and the sheet -----------------------------------------------------


def test_compare_all_is_compare_of_each(pipe: Any) -> None:
    trajectory = recorded(pipe)
    made = {
        "a": quantize(pipe, schemes.W8A8, trajectory),
        "b": quantize(pipe, schemes.W8A16, trajectory),
    }
    found, drawn = compare_all(pipe, made, LINES, count=3, batch=2)
    assert drawn.keys() == {"a", "b", FULL, BF16}
    assert [len(batch) for batch in drawn["a"].batches] == [2, 1]
    for name, artifact in made.items():
        alone = compare(pipe, artifact, LINES, count=3, batch=2)
        for fact in ("psnr_db", "ssim", "bf16_floor_psnr_db", "execution", "int8_weight_share"):
            assert getattr(found[name], fact) == getattr(alone, fact), fact
    assert found["a"].psnr_db != found["b"].psnr_db


def test_the_demo_makes_a_sheet_and_numbers(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the tiny model in place of the shipped one: first without the shipped artifact."""
    monkeypatch.setattr(SHOWCASE, "demo", lambda model: pipe)
    monkeypatch.setattr(SHOWCASE, "defaults", lambda model: Defaults(10, 2.0))
    monkeypatch.setattr("tenuto.cli.commands.check_model", lambda model: None)
    monkeypatch.setattr(SHOWCASE, "shipped_artifact", lambda model: None)
    out = tmp_path / "out"
    assert cli.main(["demo", "--out", str(out)]) == 0
    text = capfd.readouterr().out
    assert str(out / "demo.png") in text and "not here" in text
    *lines, last = text.splitlines()
    assert all(len(line) <= 80 for line in lines if str(out) not in line)
    assert last.startswith("Next: tenuto quantize MODEL ")
    data = json.loads((out / "demo.json").read_text())
    assert data["absent"] == ["w4a8-router"]
    assert [*data["variants"]] == [FULL, "w8a8", "w8a8-half"]
    with Image.open(out / "demo.png") as two:
        size = two.size
    artifact = quantize(pipe, schemes.W8A16, recorded(pipe))
    monkeypatch.setattr(SHOWCASE, "shipped_artifact", lambda model: artifact)
    assert cli.main(["demo", "--out", str(out), "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data == json.loads((out / "demo.json").read_text())
    assert data["absent"] == []
    assert [*data["variants"]] == [FULL, "w8a8", "w8a8-half", "w4a8-router"]
    full, made, half, shipped = data["variants"].values()
    assert full["psnr_db"]["median"] is None and full["identical_pictures"] == 8
    assert made["psnr_db"]["median"] > 25 and made["execution"]["mode"] == "int8"
    assert (made["reuse_ratio"], half["reuse_ratio"]) == (0, 0.5), "of whole calls, by a forecast"
    assert full.keys() == made.keys() == shipped.keys()
    with Image.open(out / "demo.png") as three:
        assert three.size[0] == size[0] and three.size[1] > size[1] + 90
        assert json.loads(three.info["tenuto"])["prompts"] == list(SHOWCASE.CAPTIONS)
    assert sorted(p.name for p in out.iterdir()) == ["demo.json", "demo.png"]


@pytest.mark.parametrize("speedup", [1.0, 2.0])
def test_compare_shows_its_images(
    tiny_pixart_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speedup: float
) -> None:
    """With nothing changed the rows are alike, and what is between them is nearly black."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    asked: dict[str, Any] = {"speedup": speedup, "prompts": Path("p.txt"), "count": 2, "steps": 10}
    said = commands.compare(str(tiny_pixart_folder), sheet=Path("sheet.png"), **asked)
    like = f"--speedup {speedup:g} --steps 10 --prompt"
    assert "Images: sheet.png" in str(said) and like in str(said.next)
    with Image.open("sheet.png") as paper:
        facts = json.loads(paper.text["tenuto"])
        rows = [pixels(paper, row, len(facts["prompts"])) for row in range(3)]
    assert sorted(facts["prompts"]) == ["a cat", "a dog"]
    apart = (rows[0] - rows[1]).abs().max()
    assert (apart <= 2) == (speedup == 1)
    assert (rows[2].max() <= 2 * GAIN) == (speedup == 1)
    with pytest.raises(TenutoError, match=r"ends in \.png"):
        commands.compare("no such model", sheet=Path("sheet.jpg"), **asked)


def pixels(paper: Any, row: int, columns: int) -> torch.Tensor:
    """Those of the first image in a row of a sheet of square ones."""
    width = (paper.width - 2 * EDGE - LABEL + GAP) // columns - GAP
    top, left = EDGE + 46 + row * (width + GAP), EDGE + LABEL
    box = (left, top, left + width, top + width)
    return torch.from_numpy(np.array(paper.convert("RGB").crop(box))).int()
