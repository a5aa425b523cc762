"""docs/models.md says what is so: every family goes through every step, and is compared with it."""

from __future__ import annotations

import warnings

import pytest

from tenuto.model import denoiser_of
from tests.core import models_table as table
from tests.core.family_pipelines import MODELS

LINES = table.PAGE.read_text(encoding="utf-8").splitlines()
WIDE = ("HunyuanVideo 1.5", "HunyuanImage 2.1")  # byT5's width is fixed in their classes
LIGHT = ("Stable Diffusion 1.5", "FLUX.1", "Qwen-Image", "Z-Image", "DiT", "FLUX.3")  # in each run
PROMISED = (
    "Qwen-Image-2.1", "Qwen-Image-Edit", "Z-Image", "FLUX.2 dev", "FLUX.2 klein", "Wan 2.1",
    "Wan 2.2", "Krea 2", "LTX-2", "Chroma", "HunyuanVideo", "HunyuanImage", "Lumina 2", "Sana",
    "HiDream", "SDXL", "Stable Diffusion 3.5", "UNet2D", "AnimateDiff", "Stable Video", "Kandinsky",
)  # fmt: skip
CASES = [n if n in LIGHT else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


@pytest.mark.parametrize("name", CASES)
def test_the_row_of_a_model(one_thread: None, name: str) -> None:
    """What the page says works, works; what it says does not, does not."""
    size = sum(p.numel() for p in denoiser_of(MODELS[name]().model).parameters())
    assert size <= (5 if name in WIDE else 3) * 1e6
    found = table.cells(name)
    wrong = [
        f"{column}: {type(error).__name__}: {error}"
        for column, (_, error) in zip(table.COLUMNS, found, strict=True)
        if error is not None
    ]
    assert table.row_line(name, [said for said, _ in found]) in LINES, "\n".join(wrong)


def test_everything_works_and_every_family_that_was_promised_is_there() -> None:
    """Only a text encoder may be missing, where the model has none."""
    for name in MODELS:
        (line,) = (line for line in LINES if line.startswith(f"| {name} |") and " B |" not in line)
        said = dict(zip(table.COLUMNS, line.strip("| ").split(" | ")[1:], strict=True))
        assert said.pop("text encoders") in (table.YES, table.NONE), name
        assert set(said.values()) == {table.YES}, name
    named = " ".join(MODELS)
    for family in PROMISED:
        assert family in named, family


def test_the_page_is_the_text_and_has_each_model_once() -> None:
    rows = tuple(f"| {name} |" for name in (*MODELS, *table.RELEASED))
    rest = [line for line in LINES if line and not line.startswith(rows)]
    assert rest == [line for line in table.page({}, {}).splitlines() if line]
    for name in (*MODELS, *table.RELEASED):
        wanted = (name in MODELS) + (name in table.RELEASED)
        assert sum(line.startswith(f"| {name} |") for line in LINES) == wanted, name


@pytest.mark.parametrize("name", table.RELEASED)
def test_the_shares_of_a_released_model(name: str) -> None:
    """As the page has them; nearly all is quantized, and all of it inside what can be reused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of diffusers
        found = table.share(*table.RELEASED[name])
    assert found.line(name) in LINES
    assert found.quantized >= 0.95
    assert max(found.branches, found.blocks, found.call) >= 0.9
