"""Artifacts below the folders of models: listed for the models that they fit, and used by path."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tenuto as tn
from gradio_app import loose_artifacts
from gradio_app.bench import Bench
from gradio_app.exports import exported
from gradio_app.settings import Settings
from tenuto.errors import TenutoError
from tenuto.resources import asset
from tests.core import single_files
from tests.core import tiny_pipelines as tiny

pytestmark = pytest.mark.filterwarnings("ignore")
UNET, DIT = (asset(f"artifacts/demo-{name}.w8a8.safetensors") for name in ("unet", "transformer"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A model with artifacts beside it, in it, in a folder of their own, and what is none."""
    roots = tmp_path / "roots"
    shutil.copytree(asset("demo-unet"), roots / "models" / "unet")
    (roots / "artifacts").mkdir()
    for place in ("models/beside", "models/unet/within", "artifacts/apart"):
        shutil.copy(UNET, roots / f"{place}.safetensors")
    shutil.copy(DIT, roots / "artifacts" / "other.safetensors")
    save_file({"x.lora_A.weight": torch.ones(1)}, roots / "lora.safetensors")
    (roots / "half.safetensors").write_bytes(UNET.read_bytes()[:5000])
    shutil.copy(UNET, tmp_path / "outside.safetensors")
    (roots / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    out = roots / "tenuto-app"
    (out / "exports").mkdir(parents=True)
    for name in ("made", "exports/not-this"):
        shutil.copy(UNET, out / f"{name}.safetensors")
    return Bench(Settings(out, (roots,), device="cpu"))


def test_those_that_fit_are_listed(bench: Bench) -> None:
    """By path, after those of the app and before those that ship; links lead nowhere."""
    found = [f"{name}.safetensors" for name in ("artifacts/apart", "models/beside")]
    found.append("models/unet/within.safetensors")
    places = bench.places
    assert places.artifacts("models/unet") == ["made", *found]
    assert places.artifacts("demo:unet")[:4] == ["made", *found]
    assert "shipped:demo-unet.w8a8" in places.artifacts("demo:unet")
    assert places.artifacts("demo:transformer")[:2] == ["made", "artifacts/other.safetensors"]
    for unknown in ("", "none", "../x"):
        assert places.artifacts(unknown) == ["made"]
    for name in found:
        assert places.artifact(name) == places.roots[0] / name
    assert exported(bench, found[1], "comfy").name == "beside-comfy.safetensors"
    for strange in ("link.safetensors", "../outside.safetensors", "half.safetensors",
                    "tenuto-app/exports/not-this.safetensors", str(UNET)):  # fmt: skip
        with pytest.raises(TenutoError):
            places.artifact(strange)


@pytest.mark.slow
def test_one_is_used_by_its_path(bench: Bench) -> None:
    made = bench.generate(
        "demo:unet", "a dog", 1, 1, 2.0, "models/beside.safetensors", False, lambda *_: None
    )
    assert made["artifact"] == "models/beside.safetensors"
    assert Path(made["pictures"]["artifact"]).is_file()
    assert "models/beside.safetensors" in made["infotext"]


def test_a_header_is_read_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where the file has changed."""
    reads = list[Path]()
    read = loose_artifacts.read_header
    monkeypatch.setattr(
        loose_artifacts, "read_header", lambda file: (reads.append(file), read(file))[1]
    )
    loose_artifacts._made_for.cache_clear()
    bench.places.artifacts("models/unet")
    first = len(reads)
    bench.places.artifacts("models/unet")
    assert len(reads) == first > 0
    changed = bench.places.artifact("models/beside.safetensors")
    shutil.copy(DIT, changed)
    os.utime(changed, ns=(1, 1))
    assert "models/beside.safetensors" not in bench.places.artifacts("models/unet")
    assert reads[first:] == [changed]


def test_a_single_file_has_those_of_its_size(tmp_path: Path) -> None:
    """Its class is not in it."""
    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    single_files.stable_diffusion_file(pipe, tmp_path / "whole.safetensors")
    trajectory = tn.record(pipe, prompts=["a dog"], steps=2)
    tn.quantize(pipe, "w8a8", trajectory, measure=False).save(tmp_path / "own.safetensors")
    shutil.copy(UNET, tmp_path / "other.safetensors")
    bench = Bench(Settings(tmp_path / "out", (tmp_path,), device="cpu"))
    assert bench.places.artifacts("whole.safetensors") == ["own.safetensors"]
