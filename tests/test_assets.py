"""The demo models' folders as a stranger finds them, and their recipe, tiny and on a CPU."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tenuto.errors import ModelError
from tenuto.sampling.loading import defaults, load
from tenuto.sampling.record import sampler

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"
MODELS = ("transformer", "unet")
SHARED = "vae"  # demo-unet has it as a link to demo-transformer's


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What diffusers and transformers warn of in their logs: they hand nothing on to the root."""
    lines: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    ear = Ear(logging.WARNING)
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [library.level for library in libraries]
    for library in libraries:
        library.addHandler(ear)
        library.setLevel(logging.WARNING)  # the command silences them for good
    yield lines
    for library, level in zip(libraries, levels, strict=True):
        library.removeHandler(ear)
        library.setLevel(level)


@pytest.mark.parametrize("name", MODELS)
def test_the_stock_class_loads_and_draws(name: str, heard: list[str]) -> None:
    """In a clone, without Tenuto and without a warning: the image that Tenuto's sampler draws."""
    import diffusers

    folder = ASSETS / f"demo-{name}"
    if os.name == "nt" and not (folder / SHARED).is_dir():
        pytest.skip("git made no links here: Windows does so only where it is allowed to")
    kind = {"transformer": "PixArtAlphaPipeline", "unet": "StableDiffusionPipeline"}[name]
    stock = getattr(diffusers, kind)
    heard.clear()  # importing the class may advise torchvision
    pipe = stock.from_pretrained(str(folder), local_files_only=True)
    options = {"transformer": {"use_resolution_binning": False, "clean_caption": False}}
    picture = pipe(
        "a lemon", num_inference_steps=2, guidance_scale=defaults(folder).guidance,
        generator=[torch.Generator().manual_seed(0)], output_type="pt", **options.get(name, {}),
    ).images  # fmt: skip
    assert not heard
    ours = load(f"demo:{name}")
    assert torch.equal(drawn(ours), picture * 2 - 1)
    assert not heard


def drawn(pipe: Any) -> torch.Tensor:
    """One image of two steps."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    return sampler(pipe, ("a lemon",), 2, defaults(pipe).guidance)(denoiser, 0, 1)


@pytest.mark.parametrize("left", ["a text file", "nothing"])
def test_a_checkout_without_links_draws_the_same(left: str, tmp_path: Path) -> None:
    """As on Windows, where git writes a link as a file, and as in a wheel, which leaves it out."""
    for name in MODELS:
        folder = tmp_path / f"demo-{name}"
        folder.mkdir()
        for path in (ASSETS / folder.name).iterdir():
            if name == "transformer" or path.name != SHARED:
                (folder / path.name).symlink_to(path)
    if left == "a text file":
        (tmp_path / "demo-unet" / SHARED).write_text(f"../demo-transformer/{SHARED}")
    pipe = load(str(tmp_path / "demo-unet"))
    assert torch.equal(drawn(pipe), drawn(load("demo:unet")))
    (tmp_path / "demo-transformer" / SHARED).unlink()
    with pytest.raises(ModelError, match=f"{SHARED} has no config.json"):
        load(str(tmp_path / "demo-unet"))


def test_loading_leaves_the_logs_as_they_were() -> None:
    """The advice about torchvision is kept away for as long as it takes."""
    names = ("transformers", "transformers.utils.import_utils", "diffusers", "tenuto")

    def state() -> list[Any]:
        loggers = [logging.getLogger(name) for name in names]
        return [(x.level, list(x.filters), list(x.handlers), x.propagate) for x in loggers]

    load("demo:transformer")  # the libraries configure their own at first use
    before = state()
    load("demo:unet")
    assert state() == before


@pytest.mark.parametrize("name", MODELS)
def test_no_file_is_too_large(name: str) -> None:
    weights = list((ASSETS / f"demo-{name}").rglob("*.safetensors"))
    assert weights and max(f.stat().st_size for f in weights) <= 15 * 2**20


@pytest.mark.slow
def test_every_stage_of_the_recipe_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "assets" / "train.py"), "--smoke", "--out", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "demo-transformer" / "model_index.json").is_file()
    assert (tmp_path / "grid-transformer.jpg").is_file()
    flow = json.loads((tmp_path / "flow" / "demo-transformer" / "model_index.json").read_text())
    assert flow["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert '"grid": true' in done.stdout
