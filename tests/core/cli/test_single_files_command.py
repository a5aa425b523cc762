"""A checkpoint in a single file, and LoRAs, on the command line, as their owner types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from tenuto import cli
from tenuto.sampling.single_file import NOTE
from tests.core import lora_files, single_files
from tests.core import tiny_pipelines as tiny

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
FILE = "my model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a LoRA of it, and, elsewhere, configurations of its kind."""
    root, pipe = tmp_path_factory.mktemp("models"), tiny.stable_diffusion("StableDiffusionPipeline")
    single_files.stable_diffusion_file(pipe, root / "mine" / FILE)
    lora_files.lora_file(pipe.unet, root / "mine" / "style.safetensors")
    pipe.save_pretrained(root / "kinds" / "sd")
    for file in (root / "kinds").rglob("*.safetensors"):
        file.unlink()
    return root


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for file in (models / "mine").iterdir():
        shutil.copyfile(file, tmp_path / "work" / file.name)
    return tmp_path / "work"


def answered(capfd: Any, *arguments: str) -> str:
    assert cli.main(arguments) == 0, capfd.readouterr().err
    return capfd.readouterr().out


def test_check_says_what_a_file_is_and_what_it_lacks(here: Path, capfd: Any) -> None:
    assert cli.main([f"./{FILE}", "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["kind"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert set(found["sizes"]) == {"denoiser", "autoencoder", "text encoders"}
    assert sum(found["sizes"].values()) == pytest.approx((here / FILE).stat().st_size, rel=0.1)
    assert "add --config" in found["problems"][0]["sentence"]
    assert cli.main(["generate", FILE, "--prompt", "a"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "no model of its kind is on this machine" in said


@pytest.mark.slow
def test_from_check_to_a_comparison(here: Path, models: Path, capfd: Any) -> None:
    """Each command names the next, which runs as it is written; the file stays where it is."""
    config, few = ("--config", str(models / "kinds")), ("--steps", "2")
    out = answered(capfd, "check", FILE, *config)
    assert out.splitlines()[-1].startswith(
        f"Next: tenuto quantize '{FILE}' --config {models}/kinds"
    )
    assert cli.main(["quantize", FILE, *config, "--scheme", "w8a8", "--out", FILE]) == 2
    assert "is a file of the model itself" in capfd.readouterr().err
    (here / "p.txt").write_text("a dog\n")
    made = ("--out", "a.safetensors", "--prompts", "p.txt", "--low-memory", "--no-measure")
    answered(capfd, "quantize", FILE, *config, "--scheme", "w8a8", *made, *few)
    common = ("generate", FILE, *config, "--prompt", "a dog", *few, "--artifact", "a.safetensors")
    plain = answered(capfd, *common, "--out", "plain.png")
    assert f"--config {models}/kinds --artifact a.safetensors" in plain.replace("\n ", "")
    answered(capfd, *common, "--out", "none.png", "--lora", "style.safetensors:0")
    out = answered(capfd, *common, "--out", "styled.png", "--lora", "style.safetensors:1.5")
    assert "--lora style.safetensors:1.5 --artifact" in out
    images = {name: Image.open(f"{name}.png") for name in ("plain", "none", "styled")}
    assert ImageChops.difference(images["plain"], images["styled"]).getbbox() is not None
    assert json.loads(images["styled"].text["tenuto"])["lora"] == ["style.safetensors:1.5"]  # type: ignore[attr-defined]
    opened = list((here.parent / "cache" / "tenuto" / "opened").rglob(NOTE))
    assert len(opened) == 1, "opened once"
    assert not list(opened[0].parent.rglob("*.safetensors")), "weights are not copied"
