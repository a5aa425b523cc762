"""The tab Export without a server: what is said of hosts, what is refused, a file that is made."""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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


def test_what_is_said_is_of_the_format_that_is_chosen(bench: Bench) -> None:
    """Where the file is or will be, what each host does with it, and why the button is grey."""
    own, code, why, ready = how_to(bench, "my-model", "own", AS_IT_IS)
    for words in ("In ComfyUI", "models/tenuto", "Tenuto Loader", "Forge", "own.safetensors"):
        assert words in own
    assert not ready and "needs no export" in why and "choose another format" in why
    assert not code, "there is no such model"
    for to, (words, others) in {
        "comfy": ("own-comfy.safetensors models/diffusion_models Forge", "models/tenuto"),
        "gguf": ("own-gguf.gguf models/unet ComfyUI-GGUF", "Forge"),
        "diffusers": ("own-diffusers", "ComfyUI"),
    }.items():
        said, _, why, ready = how_to(bench, "my-model", "own", to)
        assert all(word in said for word in words.split()), said
        assert others not in said and "as it is" not in said and ready and not why
    for to in FORMS:
        demo = how_to(bench, MODEL, "own", to)[0]
        assert "models/" not in demo and ("for diffusers" in demo) == (to != "diffusers")
    for nothing in (None, "", "none", "<b>"):
        said, code, why, ready = how_to(bench, MODEL, nothing, "gguf")
        assert "There is no artifact yet." in said and "no artifact" in why
        assert not code and not ready


def test_python_has_what_it_uses(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No name is undefined: the lines for the artifact run, and an image is there."""
    code = how_to(bench, MODEL, "own", AS_IT_IS)[1]
    assert "num_inference_steps=20," in code and "guidance_scale=2.0," in code
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "sample.py"
    script.write_text(code.replace("num_inference_steps=20", "num_inference_steps=2"), "utf-8")
    runpy.run_path(str(script))
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("to", "kind", "lines"),
    [
        ("diffusers", "StableDiffusionPipeline", ["unet=unet", "'a golden retriever'"]),
        ("diffusers", "StableDiffusionInpaintPipeline", ["load_image('mask_image.png')"]),
        ("gguf", "StableDiffusionPipeline", ["from_single_file", "subfolder='unet'"]),
    ],
)
def test_python_of_an_export_is_complete(
    bench: Bench, tmp_path: Path, to: str, kind: str, lines: list[str]
) -> None:
    """Each name is imported or made before it is used, and each import exists."""
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    parts = {"unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, **parts}))
    bench.places.added.append(folder.parent)
    code = how_to(bench, "mine", "own", to)[1]
    assert all(line in code for line in (*lines, repr(str(folder)))), code
    known, unknown = {*dir(builtins)}, list[str]()
    for statement in ast.parse(code).body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        unknown += [n.id for n in names if isinstance(n.ctx, ast.Load) and n.id not in known]
        known |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
        if isinstance(statement, ast.Import | ast.ImportFrom):
            known |= {alias.asname or alias.name for alias in statement.names}
        if isinstance(statement, ast.ImportFrom):
            module = importlib.import_module(str(statement.module))
            assert all(hasattr(module, alias.name) for alias in statement.names)
    assert not unknown, (unknown, code)


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
    assert seen(job)[2].interactive is True
    with pytest.raises(TenutoError, match="is being made, or stands in line"):
        begun(bench, MODEL, "own", "gguf")
    bench.stop(job.id, "export")
    assert job.over.wait(PATIENCE) and job.state == STOPPED and not part.exists()
    assert seen(job)[2].interactive is False, "there is nothing to stop"
    bench.desk.close()


@pytest.mark.slow
def test_a_file_for_comfyui_is_made(bench: Bench) -> None:
    job = begun(bench, MODEL, "own", "comfy")
    assert job.over.wait(PATIENCE) and job.state == DONE, (job.error, job.log.read_text())
    file = bench.places.out / "exports" / "own-comfy.safetensors"
    assert read_exported(file) and not job.log.exists()
    said = status(job, "")
    assert "Export done" in said and "models/diffusion_models" in said and str(file) not in said
    assert seen(job)[3].value == str(file) or seen(job)[3].visible is True
    json.dumps(bench.facts(job.id, "export"))
    with pytest.raises(TenutoError, match="in the folder exports already"):
        begun(bench, MODEL, "own", "comfy")
    assert chosen(bench, None)[0].keys() == {"__type__"}, "no calibration is done"
    bench.desk.close()
