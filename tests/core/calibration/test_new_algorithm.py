"""A new algorithm is one file: no list elsewhere has to know it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tenuto import Artifact, SchemeError, cli
from tenuto.calibration import algorithms, effort
from tenuto.numerics import Recipe

SOURCE = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tenuto.calibration.algorithms import Effort
from tenuto.calibration.algorithms.nearest import RoundToNearest


@dataclass(frozen=True)
class Toy:
    steps: int = 0

    name: ClassVar[str] = "toy"
    needs_inputs: ClassVar[bool] = False

    @classmethod
    def at(cls, effort: Effort) -> Toy:
        return cls(effort.iterations)

    def __call__(self, block: Any, layers: Any, *args: Any, **kwargs: Any) -> Any:
        return RoundToNearest()(block, layers)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file of a user's own, on the package's path."""
    assert "toy" not in algorithms.names("denoiser")  # looked for before it was there
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "toy.py").write_text(SOURCE)
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(folder)])
    yield
    sys.modules.pop(f"{algorithms.__name__}.toy", None)
    vars(algorithms).pop("toy", None)


def test_the_command_quantizes_by_it(
    toy: None, tiny_pixart_folder: Path, tmp_path: Path, one_thread: Any
) -> None:
    """By its name, at the effort of the preset; the recipe of the artifact names it again."""
    prompts, out = tmp_path / "p.txt", tmp_path / "a.safetensors"
    prompts.write_text("a red dog\na blue cat\n")
    arguments = ["quantize", str(tiny_pixart_folder), "--scheme", "w4a16", "--rounding", "toy"]
    assert cli.main([*arguments, "--prompts", str(prompts), "--out", str(out)]) == 0
    recipe = Artifact.load(out).header["recipe"]
    used = [row["algorithm"] for row in recipe if row["algorithm"]]
    assert used[-1] == {"name": "Toy", "steps": effort("quick").effort.iterations}
    again = Recipe.from_json(recipe, algorithms.algorithm).rules[-1].algorithm
    assert asdict(again) == {"steps": used[-1]["steps"]}


def test_it_is_among_the_choices(toy: None) -> None:
    assert "toy" in algorithms.names("denoiser") and "toy" in algorithms.names("encoder")
    with pytest.raises(SchemeError, match="toy"):
        effort("quick").rounding("nothing")


def test_a_file_that_is_gone_is_no_choice() -> None:
    assert "toy" not in algorithms.names("denoiser")
