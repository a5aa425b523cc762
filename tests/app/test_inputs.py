"""The folder of start images has a limit; what something may still ask for is not taken from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gradio_app import inputs, jobs
from gradio_app.bench import Bench
from gradio_app.call import kept
from gradio_app.inputs import bounded
from gradio_app.jobs import Job
from gradio_app.places import Places
from gradio_app.settings import Settings
from tenuto.artifact import Artifact
from tenuto.resources import asset
from tests.patience import PATIENCE


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """An output folder whose inputs may be three."""
    monkeypatch.setattr(inputs, "MOST", 3)
    (tmp_path / "inputs").mkdir()
    return Places(tmp_path)


def put(places: Places, *names: str, size: int = 10) -> None:
    """Files of the folder, each used a second after the one before."""
    for age, name in enumerate(names):
        file = places.inputs / f"{name}.png"
        file.write_bytes(b"x" * size)
        os.utime(file, (1_000_000 + age, 1_000_000 + age))


def there(places: Places) -> list[str]:
    return sorted(path.stem for path in places.inputs.iterdir())


def call(*names: str) -> dict[str, Any]:
    return {"call": {f"image{i}": {"file": f"{n}.png"} for i, n in enumerate(names)} | {"eta": 1}}


def test_the_oldest_go(places: Places) -> None:
    put(places, *"abcde")
    (places.inputs / "note.txt").write_text("not the app's")
    bounded(places, [])
    assert there(places) == ["c", "d", "e", "note"]


def test_the_largest_go_by_what_all_of_them_take(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "BYTES", 25)
    put(places, *"abc")
    bounded(places, [])
    assert there(places) == ["b", "c"]
    put(places, "huge", size=100)
    bounded(places, [])
    assert there(places) == ["b", "c"], "it is the oldest"
    put(places, "last", size=100)
    os.utime(places.inputs / "last.png")
    bounded(places, [])
    assert there(places) == ["last"], "the newest stays, whatever its size"


def test_what_may_still_be_asked_for_stays(places: Places) -> None:
    """By a job that runs, an unfinished calibration, an artifact; not by a damaged one."""
    put(places, *"abcdefghij")
    places.keep_request("left", call("a"))
    (places.out / "unfinished" / "damaged.json").write_text("[1")
    made = Artifact.load(asset("artifacts/demo-unet.w8a8.safetensors"))
    made.header["schedule"] |= call("c")
    made.save(places.out / "made.safetensors")
    (places.out / "broken.safetensors").write_bytes(b"x" * 50)
    bounded(places, [call("b", "d"), {"call": None}, {}])
    assert there(places) == ["a", "b", "c", "d", "h", "i", "j"]
    (places.out / "unfinished" / "left.json").unlink()
    bounded(places, [])
    assert there(places) == ["c", "h", "i", "j"]


def test_an_image_that_is_used_again_is_new(places: Places) -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    name = kept({"image": image}, places.inputs)["image"]["file"]
    os.utime(places.inputs / name, (1, 1))
    kept({"image": image}, places.inputs)
    put(places, *"abc")
    bounded(places, [])
    assert name in {path.name for path in places.inputs.iterdir()}


WAITS = "import sys; sys.stdin.readline(); sys.stdin.read()"


def test_a_running_job_keeps_its_images(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs and no longer: by the functions that the buttons call."""
    monkeypatch.setattr(jobs, "WORKER", WAITS)
    bench = Bench(Settings(places.out))
    put(places, *"abcdef")
    asked = call("a") | {"out": str(places.out / "x.safetensors")}
    job = bench.desk.start(Job("calibrate", asked, places.out / "log"))
    assert bench.desk.requests == [asked] and job.alive
    bounded(places, bench.desk.requests)
    assert there(places) == ["a", "d", "e", "f"]
    bench.stop(job.id, "calibrate")
    assert job.over.wait(PATIENCE) and not bench.desk.requests
    monkeypatch.setattr(jobs, "WORKER", "import sys; sys.stdin.readline(); sys.exit(7)")
    job = bench.compare("demo:unet", ["shipped:demo-unet.w8a8"], 1)
    assert job.over.wait(PATIENCE)
    assert there(places) == ["d", "e", "f"]
    assert json.loads(json.dumps(job.request))["speedup"] is None
