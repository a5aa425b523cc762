"""The benchmark of one calibration in other runs, on a tiny denoiser: rows, each made once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tenuto as tn
from benchmarks import other_steps

pytestmark = pytest.mark.filterwarnings(  # of diffusers
    "ignore:__array__ implementation:DeprecationWarning"
)


def words(folder: Path, out: Path, *more: str) -> list[str]:
    """A command line for the tiny model."""
    few = ["--model", str(folder), "--recorded", "2", "--images", "2", "--batch", "2"]
    return [*few, "--work", str(out.parent / "work"), "--out", str(out), *more]


def test_rows_are_made_once_and_make_a_table(
    tiny_pixart_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rows.jsonl"
    asked = words(tiny_pixart_folder, out, "--scheme", "w8a8-static", "--run", "DDIM 10")
    other_steps.main(asked)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["key"]["run"] for row in rows] == ["DDIM 10"]
    for row in rows:
        assert row["equal_codes"] > 0.9  # 8 bits round to nearest, whatever the run
        assert all(len(row[k]) == 2 and 20 < min(row[k]) < 100 for k in ("transferred", "own"))
        assert row["transferred"] != row["own"], "a range a step is that of its run"
    made = [tn.Artifact.load(path) for path in sorted((tmp_path / "work").iterdir())]
    times = [artifact.header["schedule"]["timesteps"] for artifact in made]
    assert [len(some) for some in times] == [10, 20] and times[0][1] == 899
    table = capsys.readouterr().out.split("\n\n", 1)[1]
    assert "| DDIM 10 | " in table and "w8a8-static, preset quick, 2 prompts, 2 images" in table

    with out.open("a") as file:
        file.write('{"cut off')
    monkeypatch.setattr(other_steps.Study, "images", lambda *_: pytest.fail("made again"))
    other_steps.main(asked)
    assert capsys.readouterr().out.strip() == table.strip()
    with pytest.raises(pytest.fail.Exception, match="made again"):
        other_steps.main([*asked, "--preset", "standard"])


@pytest.mark.parametrize("run", other_steps.RUNS, ids=lambda run: run.name)
def test_every_run_has_its_solver_and_steps_and_leaves_the_pipeline(
    tiny_pixart_folder: Path, run: other_steps.Run
) -> None:
    asked = other_steps.parsed(words(tiny_pixart_folder, Path("none")))
    study = other_steps.Study(str(tiny_pixart_folder), asked)
    before = study.pipe.scheduler
    with study.solved_as(run):
        kind = type(study.pipe.scheduler).__name__
        assert kind == other_steps.KINDS[run.solver]
        recorded = study.recorded(run)
        assert study.pipe.scheduler.config.timestep_spacing == (run.spacing or "trailing")
        assert study.pipe.scheduler.config.prediction_type == "v_prediction"
    assert study.pipe.scheduler is before
    calls = {"HeunDiscreteScheduler": 2 * run.steps - 1}.get(kind, run.steps)
    assert recorded.steps == run.steps and len(recorded.calls) == calls
    assert recorded.seed == run.seed


def test_what_is_lost_is_paired_and_has_a_limit() -> None:
    def row(transferred: list[float], own: list[float]) -> dict[str, Any]:
        return {"transferred": transferred, "own": own}

    found = other_steps.loss(row([40.0, 42.0, 30.0], [41.0, 42.0, 34.0]))
    assert found.medians == -1 and found.holds
    assert found.paired == pytest.approx(-5 / 3)
    assert found.error == pytest.approx(math.sqrt(13 / 3 / 3))  # variance of -1, 0, -4
    assert not other_steps.loss(row([38.4], [40.0])).holds
    alone = other_steps.loss(row([38.5], [40.0]))
    assert alone.holds and math.isnan(alone.error)
    assert other_steps.loss(row([45.0], [40.0])).holds


def test_equal_images_and_equal_codes() -> None:
    image = torch.zeros(2, 3, 4, 4)
    other = image.clone()
    other[1] += 0.02  # 10 log10(4 / 0.0004)
    assert other_steps.distances(image, other) == [200.0, pytest.approx(40, abs=1e-4)]

    def made(value: int) -> tn.Artifact:
        layers = {"a": {}, "b": {}, f"only{value}": {}}
        codes = {"a": torch.ones(2), "b": torch.tensor([value]), f"only{value}": torch.ones(1)}
        tensors = {f"weights/{name}.codes": code for name, code in codes.items()}
        return tn.Artifact({"layers": layers}, tensors)

    assert other_steps.equal_codes(made(1), made(1)) == 1
    assert other_steps.equal_codes(made(1), made(2)) == 0.5
