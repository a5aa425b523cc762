"""docs/models.md says what is so: every family goes through every step, and is compared with it."""

from __future__ import annotations

import warnings

import pytest

from tests.core import models_table as table
from tests.core.family_pipelines import MODELS

LINES = table.PAGE.read_text(encoding="utf-8").splitlines()
LIGHT = ("Stable Diffusion 1.5", "FLUX.1", "Qwen-Image", "Z-Image", "DiT", "FLUX.3")  # in each run
CASES = [n if n in LIGHT else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


@pytest.mark.parametrize("name", CASES)
def test_the_row_of_a_model(one_thread: None, name: str) -> None:
    """What the page says works, works; what it says does not, does not."""
    found = table.cells(name)
    wrong = [
        f"{column}: {type(error).__name__}: {error}"
        for column, (_, error) in zip(table.COLUMNS, found, strict=True)
        if error is not None
    ]
    assert table.row_line(name, [said for said, _ in found]) in LINES, "\n".join(wrong)


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
