"""The pages: their code runs as it stands, and what they name is there."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tenuto as tn
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.calibration.replay import inputs_of, outputs
from tenuto.model.backbone import layers

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path) -> list[tuple[int, str]]:
    """(first line, code) of every block of a page that is marked python."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text[: m.start(1)].count("\n"), m[1]) for m in found]


WITH_CODE = [page for page in DOCS if blocks(page)]


@pytest.fixture(scope="module")
def ran(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Page -> the names that its blocks leave, imported as one module with the page's lines."""
    found: dict[str, dict[str, Any]] = {}
    for page in WITH_CODE:
        lines: list[str] = []
        for line, code in blocks(page):
            lines += [""] * (line - len(lines)) + code.splitlines()
        file = tmp_path_factory.mktemp("docs") / f"{page.stem.replace('-', '_')}.py"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with torch.random.fork_rng(devices=[]):
            spec.loader.exec_module(module)
        found[page.stem] = vars(module)
    return found


def test_there_is_code_and_it_runs(ran: dict[str, dict[str, Any]]) -> None:
    assert "extending" in ran


def test_the_family_is_true(ran: dict[str, dict[str, Any]]) -> None:
    names = ran["extending"]
    model, backbone = names["model"], names["backbone"]
    assert type(model).__name__ in names["CLASSES"]
    for name in (*backbone.blocks, *backbone.temporal, *backbone.ends):
        assert isinstance(model.get_submodule(name), torch.nn.Module)
    for branch in backbone.branches:
        assert branch.block in backbone.blocks and model.get_submodule(branch.name) is not None
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    fields = {f.name for f in dataclasses.fields(backbone)} - {"family"}
    assert fields <= set(re.findall(r"^\| `(\w+)` \| ", text, re.M)), "the table has every field"


def test_the_algorithm_is_no_worse_than_round_to_nearest(ran: dict[str, dict[str, Any]]) -> None:
    """And better, here: it would be no example otherwise. The block is left as it was."""
    names = ran["extending"]
    model, calls = names["model"], names["trajectory"].calls
    block = model.get_submodule("layers.1")
    bank = inputs_of(model, "layers.1", calls, "cpu")
    plan = {name: tn.schemes.W4A16 for name, _ in layers(block)}
    with torch.no_grad():
        target = outputs(block, bank, "cpu")
        before = [p.clone() for p in block.parameters()]
        errors = []
        for method in (RoundToNearest(), names["Rescale"]()):
            found = method(block, plan, bank, target)
            assert all(map(torch.equal, before, block.parameters()))
            for name, q in found.items():
                block.get_submodule(name).weight.copy_(q.dequantize())
            errors.append(float((outputs(block, bank, "cpu") - target).square().mean()))
            for p, old in zip(block.parameters(), before, strict=True):
                p.copy_(old)
    assert errors[1] < errors[0]
    assert names["artifact"].header["recipe"][0]["algorithm"] == {"name": "Rescale", "tries": 3}


@pytest.mark.parametrize("page", [*DOCS, ROOT / "README.md"], ids=lambda p: p.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Paths in backticks: `core/tenuto/clock.py`, `benchmarks/quality.py`."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"`((?:core|tests|docs|assets|benchmarks)/[\w./-]*[\w/])`", text)
    missing = [name for name in found if not (ROOT / name).exists() and "x.py" not in name]
    assert not missing


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_a_page_is_short_and_linked(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 200
    assert f"](docs/{page.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_site_has_every_page_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    grouped = [part for part in nav if isinstance(part, dict)]
    below = [page for part in grouped for pages in part.values() for page in pages]
    listed = ["index.md", *(file for page in below for file in page.values())]
    assert sorted(listed) == [page.name for page in DOCS]


def test_the_table_of_the_contract_is_the_list_of_its_cases() -> None:
    page = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    files = (ROOT / "tests" / "hosts" / "contract").glob("test_*.py")
    source = "\n".join(path.read_text("utf-8") for path in files)
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    cases = re.findall(r"^def test_(\w+)\(", source, re.M)
    assert sorted(listed) == sorted(cases)
