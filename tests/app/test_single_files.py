"""Single-file checkpoints in the app: chosen like any model, in every tab's work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gradio_app.bench import Bench
from gradio_app.checking import looked_at
from gradio_app.exports import begun
from gradio_app.settings import Settings
from tenuto.errors import TenutoError
from tests.core import single_files, tiny_pipelines
from tests.patience import PATIENCE

FILE = "checkpoints/my model.safetensors"


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a model that is there for its configurations alone, and a LoRA."""
    root = tmp_path_factory.mktemp("roots")
    pipe = tiny_pipelines.stable_diffusion("StableDiffusionPipeline")
    pipe.save_pretrained(root / "kind")
    for file in (root / "kind").rglob("*.safetensors"):
        file.unlink()
    single_files.stable_diffusion_file(pipe, root / FILE)
    return root


@pytest.fixture
def bench(roots: Path, tmp_path: Path) -> Any:
    (tmp_path / "out").mkdir()
    bench = Bench(Settings(tmp_path / "out", (roots,), device="cpu"))
    yield bench
    bench.desk.close()


def over(job: Any) -> Any:
    assert job.over.wait(PATIENCE)
    assert job.state == "done", (job.error, job.log.read_text()[-2000:])
    return job


def test_it_is_listed_and_lies_nowhere_else(bench: Any, roots: Path, tmp_path: Path) -> None:
    assert FILE in bench.places.models()
    outside = shutil.copy(roots / FILE, tmp_path / "outside.safetensors")
    (roots / "link.safetensors").symlink_to(outside)
    try:
        assert "link.safetensors" not in bench.places.models()
        for name in ("link.safetensors", str(outside), "../outside.safetensors"):
            with pytest.raises(TenutoError, match="There is no model"):
                bench.places.model(name)
    finally:
        (roots / "link.safetensors").unlink()
    folder = Path(bench.places.model(FILE))
    assert folder.parent == bench.places.out / "opened"
    moved = roots / "moved"  # a note in a folder of the user's might lead out of the roots
    shutil.copytree(folder, moved)
    try:
        with pytest.raises(TenutoError, match="weights elsewhere"):
            bench.places.model("moved")
    finally:
        shutil.rmtree(moved)


@pytest.mark.slow
def test_it_is_calibrated_compared_generated_and_exported(bench: Any) -> None:
    places = bench.places
    folder = places.model(FILE)
    how = {"steps": 2, "prompts": "a lemon"}
    job = over(bench.calibrate(FILE, "of-a-file", "w8a8", "quick", 0.3, iterations=1, **how))
    assert job.request["model"] == folder and job.request["shown_model"] == FILE
    found = bench.generate(FILE, "a lemon", 7, 2, None, "of-a-file", True, lambda *_: None)
    assert set(found["pictures"]) == {"full", "artifact"}
    job = over(bench.compare(FILE, ["of-a-file"], 1, steps=2))
    assert job.result["numbers"]["of-a-file"]["psnr_db"]
    over(bench.calibrate(FILE, "its-encoder", None, "quick", None, text_encoder="w8", **how))
    job = over(begun(bench, FILE, "of-a-file", "gguf"))
    assert Path(job.result["out"]).is_file()


def test_the_check_before_start(bench: Any) -> None:
    values = [FILE, "x", "w8a8", "quick", 0, "", "", 0, "", "", "", "gptq", "", *[None] * 2]
    *_, said = looked_at(bench, *values, *[""] * 5)
    assert "It can be calibrated." in said and "of memory" in said
