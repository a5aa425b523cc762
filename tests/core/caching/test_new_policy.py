"""A new cache policy is one file: no list elsewhere has to know it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tenuto.caching
from tenuto import Artifact, cli
from tenuto.caching import Facts, candidates, made, policies, rules

SOURCE = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tenuto.caching import CacheSchedule, Facts


@dataclass(frozen=True)
class Middle:
    """The step in the middle is reused."""

    name: ClassVar[str] = "middle"

    def __call__(self, timesteps, branches) -> CacheSchedule:
        computed = [row != len(timesteps) // 2 for row in range(len(timesteps))]
        return CacheSchedule.steps(computed, timesteps, branches)

    @classmethod
    def for_share(cls, share: float, facts: Facts) -> list[Middle]:
        return [cls()]
'''
FACTS = Facts(tuple(map(float, range(10, 0, -1))), ("a", "b"), (1.0,) * 10)
LOGITS = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file of a user's own, on the package's path."""
    assert "middle" not in policies()  # looked for before it was there
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "middle.py").write_text(SOURCE)
    monkeypatch.setattr(tenuto.caching, "__path__", [*tenuto.caching.__path__, str(folder)])
    yield
    sys.modules.pop("tenuto.caching.middle", None)
    vars(tenuto.caching).pop("middle", None)


def test_the_command_measures_it(
    middle: None, tiny_pixart_folder: Path, tmp_path: Path, one_thread: None
) -> None:
    """As a candidate beside the others, and its score is in the header."""
    out = tmp_path / "a.safetensors"
    arguments = ["train-router", str(tiny_pixart_folder), "--reuse", "0.25", "--iterations", "1"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    scores = Artifact.load(out).header["route"]["scores"]
    assert scores["middle"] > 0
    assert {"router spread 1", "step programme age^2"} < scores.keys()


def test_a_host_lists_it(middle: None) -> None:
    assert "middle" in rules(("first", "period"))
    schedule = made(rules(())["middle"], {"period": 2})(FACTS.timesteps, FACTS.branches)
    assert schedule.table[:, 0].tolist() == [row != 5 for row in range(10)]


def test_the_policies_of_the_library() -> None:
    """Controls are no candidates, nor what was not measured: costs of steps, scores of cells."""
    assert policies().keys() == {
        "interval", "late interval", "random", "router", "step programme", "growing window",
        "taylorseer", "deepcache", "learning-to-cache", "l2p", "first block", "magcache",
        "easycache",
    }  # fmt: skip
    kinds = {"late", "step"}
    assert {label.split()[0] for label in candidates(0.3, FACTS)} == kinds
    plain = Facts(FACTS.timesteps, FACTS.branches)
    assert {label.split()[0] for label in candidates(0.3, plain)} == {"late"}
    scored = replace(FACTS, logits=LOGITS)
    assert {label.split()[0] for label in candidates(0.3, scored)} == kinds | {"router"}
    series = "TaylorSeer: first steps, then one of"
    assert set(rules(("first", "period"))) == {"one of", "first steps, then one of", series}


TABLES = [name for name, cls in policies().items() if hasattr(cls, "for_share")]


@pytest.mark.parametrize("name", TABLES)
def test_each_makes_itself_for_a_share(name: str) -> None:
    """As near as whole steps are; valid, and the same twice. Others decide at run time."""
    cls: type = policies()[name]
    found = getattr(cls, "for_share")(0.25, replace(FACTS, logits=LOGITS))  # noqa: B009
    tables = [policy(FACTS.timesteps, FACTS.branches) for policy in found]
    again = [policy(FACTS.timesteps, FACTS.branches) for policy in found]
    assert tables and all(abs(table.reuse_ratio - 0.25) <= 0.051 for table in tables)
    for one, other in zip(tables, again, strict=True):
        assert bool(one.table[0].all()) and one.table.tolist() == other.table.tolist()
        assert (one.timesteps, one.branches) == (FACTS.timesteps, FACTS.branches)
