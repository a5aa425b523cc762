"""The speedup without a server: what is said of it before a run, what a run does, what is kept."""

from __future__ import annotations

import json
import re
import threading
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from gradio_app import calibrate, compare, generate, making, measured, speedup_fields, worker
from gradio_app.bench import Bench
from gradio_app.curve import curve
from gradio_app.infotext import parsed
from gradio_app.jobs import DONE, Job
from gradio_app.pictures import restored
from gradio_app.restore import _restored
from gradio_app.settings import Settings
from gradio_app.speedup import (
    Known,
    asked,
    automatic,
    forecast_for,
    in_words,
    known,
    outlook,
    scheduler,
    shipped,
)
from gradio_app.speedup_fields import default_for, safest, told, usable
from gradio_app.worker import Reports
from tenuto.artifact import Artifact
from tenuto.caching import SAFE, Forecast, about_db
from tenuto.errors import TenutoError
from tenuto.resources import asset
from tests.app.kernels import kernel, without_forecast

WITHOUT = "without"  # an artifact as of before there were forecasts
MODEL = "demo:unet"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with artifacts of the shipped U-Net that have a forecast."""
    folder = tmp_path_factory.mktemp("out")
    for name, source, more in (
        ("plain", "w8a8", {}),
        ("routed", "w4a8-router", {}),
        ("preset", "w8a8", {"default": 1.5, "measured": {"scores": [
            {"skipped": 10, "psnr_db": 47.25, "predicted": 1e-4},
        ]}}),
    ):  # fmt: skip
        made = Artifact.load(asset(f"artifacts/demo-unet.{source}.safetensors"))
        made.add_forecast(kernel()).header["forecast"] |= more
        made.save(folder / f"{name}.safetensors")
    old = without_forecast(asset("artifacts/demo-unet.w8a8.safetensors"))
    old.save(folder / f"{WITHOUT}.safetensors")
    return folder


@pytest.fixture
def bench(out: Path) -> Bench:
    return Bench(Settings(out, device="cpu"))


def seen(html: str) -> str:
    """The words of a piece of HTML."""
    text = re.sub("<[^>]+>", " ", html.partition("<figure")[0])
    return " ".join(unescape(text).split())


# --- before a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [9, 20, 33])
def test_as_many_calls_are_told_as_are_computed(out: Path, steps: int) -> None:
    """The plan of the library says the same, at the steps of the kernel to the last digit."""
    found = known(out / "plain.safetensors")
    for speedup in (1, 1.3, 2, 3.7, 200):
        told = outlook(found, steps, speedup)
        times = torch.linspace(999, 49, steps, dtype=torch.float64).tolist()
        plan = Forecast(kernel(), speedup).plan(times)
        assert (told.calls, told.db is None) == (plan.calls, plan.calls == steps)
        if told.db is not None:
            assert told.db == pytest.approx(about_db(plan.error), abs=1e-6 if steps == 20 else 0.1)


def test_what_is_said_of_a_run(bench: Bench) -> None:
    slider, said = told(bench, 2, MODEL, "plain", 20)
    assert slider.interactive and 'data-calls="10" data-steps="20"' in said
    found = outlook(known(bench.places.artifact("plain")), 20, 2)
    assert found.db is not None
    assert seen(said) == (
        f"10 of 20 calls computed , the others forecast. Predicted: about {found.db:.0f} dB PSNR "
        f"to the image with every call (higher is nearer). That is, {in_words(found.db)}."
    )
    assert "left out meanwhile" in told(bench, 2, MODEL, "routed", 20)[1]
    assert "Measured at calibration: 47.2 dB" in told(bench, 2, MODEL, "preset", 20)[1]
    assert "Measured" not in told(bench, 2, MODEL, "preset", 30)[1], "of another run"
    off = seen(told(bench, 1, MODEL, "plain", 20)[1])
    assert off.startswith("Off: each of the 20 calls is computed. At ")
    safe = float(off.split("At ")[1].split(",")[0])
    assert outlook(known(bench.places.artifact("plain")), 20, safe).calls == found.safe


@pytest.mark.parametrize(
    ("artifacts", "steps", "on", "words"),
    [
        ("plain", 8, True, "in runs of 9 to 200 steps"),
        ("plain", 201, True, "in runs of 9 to 200 steps"),
        ("plain", "x", True, "The number of steps is a number"),
        ("none", 20, True, "no artifact 'none'"), ("", 8, True, "in runs of 9 to 200 steps"),
    ],
)  # fmt: skip
def test_where_nothing_can_be_skipped_one_sentence_says_why(
    bench: Bench, artifacts: Any, steps: Any, on: bool, words: str
) -> None:
    slider, said = told(bench, 2, MODEL, artifacts, steps, on)
    assert slider.interactive is False
    assert words in seen(said)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
def test_a_sampler_with_noise_of_its_own_skips_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    monkeypatch.setattr(speedup_fields, "scheduler", lambda _: EulerAncestralDiscreteScheduler())
    for artifact in ("plain", ""):
        slider, said = told(bench, 2, MODEL, artifact, 20)
        assert slider.interactive is False and "noise of its own" in said


@pytest.mark.parametrize("artifacts", [WITHOUT, "", [], ["plain", WITHOUT]])
def test_without_a_forecast_of_its_own_the_shipped_one_is_told(
    bench: Bench, artifacts: Any
) -> None:
    """With its predicted error, and the words that it was not measured on the model."""
    slider, said = told(bench, 2, MODEL, artifacts, 20)
    found = outlook(shipped(MODEL), 20, 2)
    assert slider.interactive and seen(said).count("not measured on your model") == 1
    assert found.db is not None and f"about {found.db:.0f} dB" in seen(said)
    assert "not measured" not in told(bench, 2, MODEL, "plain", 20)[1]


def test_off_is_off(bench: Bench) -> None:
    """An artifact that is off: nothing stands in for its forecast."""
    slider, said = told(bench, 2, MODEL, "plain", 20, False)
    assert (
        slider.interactive is False
        and seen(said) == "Off, as the artifact is: every call is computed."
    )
    assert usable(bench, MODEL, "plain", 2, False) == 1
    assert safest(bench, MODEL, "plain", 20, False).keys() == {"__type__"}, "it stays"
    assert told(bench, 2, MODEL, "", 20, False) and usable(bench, MODEL, "", 2, False) == 2
    passed: list[Any] = []

    def taken(*given: Any, stops: int, loras: str) -> Any:
        assert stops == bench.studio.stops and loras == ""
        passed.append(given)
        raise TenutoError("seen")

    bench.generate = taken  # type: ignore[method-assign]
    own = [None, None, "", "", "", "", ""]  # the pipeline's own settings, left empty
    for on in (True, False):
        values = [MODEL, "a", 7, 10, 2.0, "plain", on, True, "A", 1, [], 2, "", *own]
        assert list(making.made_now(bench, *values))
    assert [given[5] for given in passed] == ["plain", ""]
    assert [given[-2] for given in passed] == [2, 1]  # the last tells of the line


def test_a_moved_slider_computes_nothing_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an artifact that has a cache schedule and no forecast, too."""
    from tenuto import caching

    made: list[Any] = []
    usual = caching.Programme
    monkeypatch.setattr(caching, "Programme", lambda steps: made.append(steps) or usual(steps))
    for value in (1, 1.5, 2):
        assert "data-calls" in told(bench, value, MODEL, WITHOUT, 23)[1]
    assert len(made) == 1


def test_auto_is_as_fast_as_is_predicted_unseen(bench: Bench) -> None:
    """The button in steps of the slider, the API to the call; the slowest of several counts."""
    folder = bench.places.model(MODEL)
    own, foreign = known(bench.places.artifact("plain")), shipped(MODEL)
    for names, forecasts in (
        (["plain"], [own]), ([], [foreign]), (["plain", WITHOUT], [own, foreign]),
    ):  # fmt: skip
        value = safest(bench, MODEL, names, 20)
        exact = automatic(folder, [bench.places.artifact(name) for name in names], 20)
        assert 1 < value <= exact < value + 0.1
        calls = [outlook(forecast, 20, exact) for forecast in forecasts]
        assert all(look.errors[look.calls] <= SAFE for look in calls)
        assert max(look.calls for look in calls) == max(look.safe for look in calls)
    assert safest(bench, MODEL, "none", 20).keys() == {"__type__"}, "it stays"
    assert asked(folder, [], "auto") == "auto", "the run knows its timesteps"


def test_what_no_forecast_ships_for(tmp_path: Path) -> None:
    """A folder of two denoisers, and one whose scheduler is not known."""
    index = {"_class_name": "X", "scheduler": ["diffusers", "DDIMScheduler"], "unet": ["a", "b"]}
    for more, words in (({"transformer_2": ["a", "b"]}, "has several"), ({}, "")):
        folder = tmp_path / (words or "one")
        (folder / "scheduler").mkdir(parents=True)
        (folder / "scheduler" / "scheduler_config.json").write_text("{}")
        (folder / "model_index.json").write_text(json.dumps(index | more))
        found = shipped(str(folder))
        assert (found.kernel is None) == bool(words) and words in found.why
        if words:
            with pytest.raises(TenutoError, match="has several"):
                asked(str(folder), [], "auto")
    assert shipped(str(folder)) is found and forecast_for(str(folder), None) is found
    (folder / "model_index.json").write_text("{}")
    assert "not known before" in shipped(str(folder)).why


def test_a_scheduler_that_is_changed_is_read_again(tmp_path: Path) -> None:
    """Nor is it remembered that there was none."""
    index = {"_class_name": "X", "scheduler": ["diffusers", "DDIMScheduler"], "unet": ["a", "b"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    config = tmp_path / "scheduler" / "scheduler_config.json"
    assert scheduler(str(tmp_path)) is None
    config.parent.mkdir()
    for prediction in ("epsilon", "v_prediction"):
        config.write_text(json.dumps({"prediction_type": prediction}))
        found = scheduler(str(tmp_path))
        assert found.config.prediction_type == prediction and scheduler(str(tmp_path)) is found
    assert shipped(str(tmp_path)).kernel.prediction == "v"


def test_several_artifacts_are_told_one_by_one(bench: Bench) -> None:
    said = told(bench, 2, MODEL, ["plain", "preset"], "")[1]
    assert seen(said).count("10 of 20 calls computed") == 2
    assert "plain :" in seen(said) and "preset :" in seen(said) and said.count("<figure") == 1


def test_the_curve_has_every_plan(out: Path) -> None:
    """Its points, where one is, what was measured; the same as a table."""
    made = curve(outlook(known(out / "preset.safetensors"), 20, 2))
    rows = re.findall(r"<td>(\d+) of 20</td><td>([\d.]+)</td><td>([\d.]*)</td>", made)
    assert made.count('class="here"') == 1 and made.count('class="measured"') == 1
    assert f'data-points="{len(rows)}"' in made and len(rows) >= 15
    assert "Circles: measured at calibration" in made
    assert [db for calls, _, db in rows if calls == "10"] == ["47.2"]
    values = [float(db) for _, db, _ in rows]
    assert values == sorted(values, reverse=True), "the more are skipped the worse"
    plain = curve(outlook(known(out / "plain.safetensors"), 20, 1))
    assert 'class="here"' not in plain and "Circles" not in plain
    assert not curve(outlook(Known(None), 20, 2))


def test_a_calibration_that_is_done_shows_its_forecast(bench: Bench, tmp_path: Path) -> None:
    job = Job("calibrate", {"out": str(bench.places.out / "plain.safetensors")}, tmp_path / "log")
    job.state = DONE
    for name, has in (("plain", True), ("none", False)):
        job.result = {"name": name}
        said = calibrate.seen(bench, job)[8]
        assert ("of 20 calls can be skipped: no difference" in said and "<polyline" in said) is has
    assert not speedup_fields.forecast_of(bench, WITHOUT)


def test_a_damaged_forecast_is_told(bench: Bench, tmp_path: Path) -> None:
    made = Artifact.load(bench.places.artifact("plain"))
    made.header["forecast"]["sigma"] = [1.0]
    bad = Bench(Settings(tmp_path))
    made.save(tmp_path / "bad.safetensors")
    slider, said = told(bad, 2, MODEL, "bad", 20)
    assert slider.interactive is False and "is damaged" in said


def test_where_the_slider_begins(bench: Bench) -> None:
    assert default_for(bench, "preset") == 1.5 and default_for(bench, ["plain", "preset"]) == 1.5
    assert default_for(bench, "plain") == default_for(bench, "none") == default_for(bench, "") == 1
    changed = generate._artifact_chosen(bench, MODEL, "preset", [MODEL, "plain"])
    assert changed[2] == 1.5 and changed[3] == [MODEL, "preset"]


def test_a_slider_that_cannot_be_moved_counts_for_nothing(bench: Bench) -> None:
    """Its value stays, so that what is filled in beside it does not change it."""
    for artifacts in ("none", ["plain", "none"]):
        assert usable(bench, MODEL, artifacts, 2) == 1
    assert usable(bench, "no model", "plain", 2) == 1
    for artifacts in ("plain", ["plain", "preset"], WITHOUT, "", None, []):
        assert usable(bench, MODEL, artifacts, 2) == 2


def test_what_the_library_is_asked(bench: Bench) -> None:
    """1 is off: the cache schedule counts then, but for an artifact that skips by itself."""
    files = {name: bench.places.artifact(name) for name in ("plain", "preset", WITHOUT)}

    folder = bench.places.model(MODEL)

    def of(speedup: Any, *names: str) -> Any:
        return asked(folder, [files[name] for name in names], speedup)

    assert (of(None, "preset"), of(1, "plain"), of(1, WITHOUT), of(1)) == (None,) * 4
    assert (of(1, "preset"), of(2, "plain"), of(2, "plain", "preset")) == (1, 2, 2)
    assert (of(2, "plain", WITHOUT), of(1.5)) == (2, 1.5)
    assert of("auto", "plain", WITHOUT) == "auto"


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_calls_are_skipped_and_the_image_says_so(bench: Bench) -> None:
    """Beside full precision and alone; the settings come back from the PNG, and into the page."""
    for beside in (False, True):
        made = bench.generate(
            MODEL, "a goldfish", 7, 10, 2.0, "plain", beside, lambda *_: None, None, 2
        )
        numbers = made["numbers"]
        assert numbers["reuse_ratio"] == 0.5 and numbers["asked_speedup"] == 2
    assert numbers["psnr_db"]["median"] > 15
    found = parsed(made["infotext"])
    assert (found["speedup"], found["artifact"]) == (2, "plain")
    path = Path(made["pictures"]["artifact"])
    assert restored(bench.places, path)["speedup"] == 2
    assert "speedup" not in restored(bench.places, made["pictures"]["full"])
    *values, chosen = _restored(bench, str(path))[2:11]
    assert values[6].value == 2 and chosen == [MODEL, "plain"]
    path.write_bytes(path.read_bytes().replace(b"Tenuto speedup: 2", b"Tenuto speedup: 9"))
    fast = _restored(bench, str(path))
    assert "at a speedup of 9." in fast[1] and fast[8].value == 4
    gone = Bench(Settings(bench.places.out / "elsewhere"))
    assert "speedup" not in restored(gone.places, path), "its artifact is not there"
    bare = bench.generate(MODEL, "a goldfish", 7, 10, 2.0, "", False, lambda *_: None, None, 2)
    said, told_before = bare["numbers"]["forecast"], outlook(shipped(MODEL), 10, 2)
    assert (said["steps"], said["skipped"], said["kernel"]) == (10, 5, "forecast-default")
    assert said["predicted_db"] == pytest.approx(told_before.db, abs=0.5)
    assert "not measured on your model" in measured.generated(bare["numbers"], 1.0, 10, "here")
    assert restored(bench.places, bare["pictures"]["artifact"])["speedup"] == 2
    assert "artifact" not in restored(bench.places, bare["pictures"]["artifact"])
    for wrong in (0.5, 201, "x", float("nan")):
        with pytest.raises(TenutoError, match="The speedup is a number from 1 to 200"):
            bench.generate(MODEL, "a", 7, 10, 2.0, "plain", False, lambda *_: None, None, wrong)


@pytest.mark.usefixtures("one_thread")
def test_auto_is_chosen_in_the_run(bench: Bench) -> None:
    """The image says the number that it was, and at that it is the same image."""
    for artifact in ("plain", ""):
        made, again = (
            bench.generate(MODEL, "a", 7, 20, 2.0, artifact, False, lambda *_: None, None, faster)
            for faster in ("auto", None)
        )
        assert (made["artifact"], again["artifact"]) == (artifact or "forecast-default", artifact)
        assert "speedup" not in parsed(again["infotext"])
        number = parsed(made["infotext"])["speedup"]
        computed, skipped = made["numbers"]["calls"]
        assert computed + skipped == 20 and number == pytest.approx(20 / computed, abs=1e-4)
        said = measured.generated(made["numbers"], 1.0, 20, "here")
        assert "denoiser calls skipped" in said
        same = bench.generate(
            MODEL, "a", 7, 20, 2.0, artifact, False, lambda *_: None, None, number
        )
        assert same["numbers"]["calls"] == [computed, skipped] and skipped > 5


@pytest.mark.usefixtures("one_thread")
def test_a_comparison_has_the_speedup(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the artifacts and not of full precision; what is asked is in the request and the card."""
    monkeypatch.setattr(bench.desk, "start", lambda job, after=None: job)  # done here instead
    with pytest.raises(TenutoError, match="or a speedup"):
        bench.compare(MODEL, [], 1)
    bare = bench.compare(MODEL, [], 1, steps=10, speedup=2)
    assert bare.request["artifacts"] == {"forecast-default": None}
    assert "forecast-default" in worker_words(bare)
    job = bench.compare(MODEL, ["plain"], 1, steps=10, speedup=2)
    assert "speedup 2" in worker_words(job)
    result = worker.compare(job.request, Reports(lambda **event: None, threading.Event()))
    numbers = result["numbers"]["plain"]
    assert numbers["reuse_ratio"] == 0.5 and numbers["asked_speedup"] == 2
    folder = Path(result["folder"])
    assert json.loads((folder / "comparison.json").read_text())["numbers"]["plain"] == numbers
    assert restored(bench.places, folder / result["pictures"]["plain"][0])["speedup"] == 2
    assert "speedup" not in restored(bench.places, folder / result["pictures"]["bf16"][0])
    auto = bench.compare(MODEL, ["plain"], 1, steps=10, speedup="auto")
    assert "speedup auto" in worker_words(auto)
    result = worker.compare(auto.request, Reports(lambda **event: None, threading.Event()))
    share = result["numbers"]["plain"]["reuse_ratio"]
    assert "denoiser calls skipped" in measured.compared(result["numbers"]) and share > 0
    shot = Path(result["folder"]) / result["pictures"]["plain"][0]
    assert restored(bench.places, shot)["speedup"] == pytest.approx(1 / (1 - share), abs=1e-4)
    auto.state = "running"
    assert 1 < compare.filled(bench, auto)[8] < 4
    without = worker.compare(bare.request, Reports(lambda **event: None, threading.Event()))
    assert without["numbers"]["forecast-default"]["reuse_ratio"] == 0.5
    (shot,) = without["pictures"]["forecast-default"]
    found = restored(bench.places, Path(without["folder"]) / shot)
    assert found["speedup"] == 2 and "artifact" not in found


def worker_words(job: Any) -> str:
    from gradio_app.view import what_of

    return what_of(job)
