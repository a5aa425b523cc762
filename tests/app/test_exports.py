"""The tab Export without a server: what is said of hosts, what is refused, a file that is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gradio_app import jobs
from gradio_app.bench import Bench
from gradio_app.elsewhere import chosen, how_to, seen
from gradio_app.exports import AS_IT_IS, ENDINGS, FORMS, begun
from gradio_app.jobs import DONE, STOPPED
from gradio_app.settings import Settings
from gradio_app.view import status
from tenuto.artifact.export import FORMATS, read_exported
from tenuto.errors import TenutoError
from tenuto.resources import asset
from tests.patience import PATIENCE

MODEL, SHIPPED = "demo:transformer", "shipped:demo-transformer.w8a8"
WAITS = "import sys; sys.stdin.readline(); sys.stdin.read()"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """With an artifact `<b>own</b>`-like name in the output folder, and a folder of models."""
    made = Bench(Settings(tmp_path / "out", device="cpu"))
    (tmp_path / "out").mkdir()
    shutil.copy(
        asset("artifacts/demo-transformer.w8a8.safetensors"), tmp_path / "out/own.safetensors"
    )
    return made


def test_formats_are_those_of_the_library() -> None:
    assert set(ENDINGS) == set(FORMS) - {AS_IT_IS} and set(ENDINGS) < set(FORMATS)


def test_what_is_said_of_hosts(bench: Bench) -> None:
    """A demo model is in no host; the words name the file."""
    own = how_to(bench, "my-model", "own")
    for words in ("In ComfyUI", "models/tenuto", "Tenuto Loader", "Forge", "own.safetensors"):
        assert words in own
    demo = how_to(bench, MODEL, "own")
    assert "models/tenuto" not in demo and "for this app and for diffusers" in demo
    for nothing in (None, "", "none", "<b>"):
        assert "There is no artifact yet." in how_to(bench, MODEL, nothing)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"to": "float"}, "one of comfy, gguf, diffusers"),
        ({"to": AS_IT_IS}, "one of comfy"),
        ({"artifact": "none"}, "There is no artifact 'none'"),
        ({"model": "../x"}, "There is no model"),
    ],
)
def test_what_cannot_be_exported_is_refused(bench: Bench, change: Any, said: str) -> None:
    with pytest.raises(TenutoError, match=said.replace("?", r"\?")):
        begun(bench, **({"model": MODEL, "artifact": "own", "to": "comfy"} | change))
    assert not (bench.places.out / "exports").exists()


def test_a_stop_leaves_no_file(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "WORKER", WAITS)
    job = begun(bench, MODEL, "own", "gguf")
    part = Path(job.request["out"]).with_name(".own-gguf.gguf.1.part")
    part.write_bytes(b"half")
    assert "own, to own-gguf.gguf" in status(job, "")
    assert seen(job, "gguf")[2].interactive is True and seen(job)[3].interactive is True
    with pytest.raises(TenutoError, match="is being made, or stands in line"):
        begun(bench, MODEL, "own", "gguf")
    bench.stop(job.id, "export")
    assert job.over.wait(PATIENCE) and job.state == STOPPED and not part.exists()
    assert seen(job, "gguf")[2].interactive is True
    bench.desk.close()


@pytest.mark.slow
def test_a_file_for_comfyui_is_made(bench: Bench) -> None:
    job = begun(bench, MODEL, "own", "comfy")
    assert job.over.wait(PATIENCE) and job.state == DONE, (job.error, job.log.read_text())
    file = bench.places.out / "exports" / "own-comfy.safetensors"
    assert read_exported(file) and not job.log.exists()
    said = status(job, "")
    assert "Export done" in said and "models/diffusion_models" in said and str(file) not in said
    assert seen(job)[4].value == str(file) or seen(job)[4].visible is True
    json.dumps(bench.facts(job.id, "export"))
    with pytest.raises(TenutoError, match="in the folder exports already"):
        begun(bench, MODEL, "own", "comfy")
    assert chosen(bench, None)[0].keys() == {"__type__"}, "no calibration is done"
    bench.desk.close()
