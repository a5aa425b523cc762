"""A new model family is one file, or an entry point: no list elsewhere has to know it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from tenuto.model import Backbone, describe, families

SOURCE = """
from torch import nn

from tenuto.model import Backbone, Branch

CLASSES = ("ToyDenoiser",)


def describe(module: nn.Module) -> Backbone:
    return Backbone("toy", ("only",), (Branch("only.0", "feed_forward", "only"),), (), (), (), ())
"""


class ToyDenoiser(nn.Module):
    """What the generic family would find no blocks in."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Sequential(nn.Linear(4, 4), nn.GELU())


def check(backbone: Backbone) -> None:
    assert backbone.family == "toy" and backbone.blocks == ("only",)
    assert [branch.name for branch in backbone.branches] == ["only.0"]


@pytest.fixture
def clean() -> Iterator[None]:
    """Nobody covers the class, before or afterwards."""
    with pytest.raises(Exception, match="no list of blocks"):
        describe(ToyDenoiser())
    yield
    for name in (f"{families.__name__}.toy", "toy_family"):
        sys.modules.pop(name, None)
    vars(families).pop("toy", None)


def test_a_file_describes_it(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(SOURCE)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    check(describe(ToyDenoiser()))


def test_an_entry_point_describes_it(
    clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an installed distribution has one: a module, and its line in the metadata."""
    (tmp_path / "toy_family.py").write_text(SOURCE)
    facts = tmp_path / "toy_family-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[tenuto.families]\ntoy = toy_family\n")
    monkeypatch.syspath_prepend(tmp_path)
    check(describe(ToyDenoiser()))
