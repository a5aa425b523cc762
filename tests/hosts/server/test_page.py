"""The workflows that ship, in ComfyUI's own page in Chromium; their images are of these files."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

HERE = Path(__file__)
FLOWS = sorted((HERE.parents[3] / "example_workflows").glob("*.json"))


def _page() -> Any:
    spec = importlib.util.spec_from_file_location("tenuto_page", HERE.with_name("page.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = _page()


@pytest.fixture
def tab(server: Any) -> Iterator[Any]:
    """ComfyUI's page, ready: what it said to another test is gone."""
    if page.chromium() is None:
        pytest.skip("there is no Chromium: apt install chromium")
    file = server.base / "models" / "tenuto" / "my-model.safetensors"  # that a workflow names
    save_file({"nothing": torch.zeros(1)}, file)
    try:
        with page.opened(f"http://127.0.0.1:{server.port}") as found:
            yield found
    finally:
        file.unlink()


def test_there_are_two() -> None:
    assert [path.stem for path in FLOWS] == ["tenuto-calibrate", "tenuto-use"]


@pytest.mark.parametrize("path", FLOWS, ids=lambda path: path.stem)
def test_every_node_is_there_and_none_is_red(tab: Any, path: Path) -> None:
    flow = json.loads(path.read_text("utf-8"))
    for node in flow["nodes"]:  # of whom newer pages draw a loader red whose file is not there
        if node["type"] == "CheckpointLoaderSimple":
            node["widgets_values"] = ["tiny_sd15.safetensors"]
    nodes = page.load(tab, flow)
    assert sorted(n["type"] for n in nodes) == sorted(n["type"] for n in flow["nodes"])
    assert not [n["type"] for n in nodes if not n["known"] or n["red"]]
    assert not page.complaints(tab)
    wired = {n["type"]: dict(n["inputs"]) for n in nodes}
    for node in flow["nodes"]:
        kept = {slot["name"]: slot.get("link") is not None for slot in node.get("inputs", ())}
        assert {k: v for k, v in wired[node["type"]].items() if k in kept} == kept or (
            node["type"] == "CLIPTextEncode"
        )
        values = next(n["widgets"] for n in nodes if n["type"] == node["type"])
        if node["type"].startswith("Tenuto_") and node.get("widgets_values"):
            there = node["widgets_values"]  # inputs that came later are last, at their default
            assert [value for _, value in values][: len(there)] == there, "a widget has moved"
    picture = page.picture(tab, nodes)
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_a_node_that_is_missing_would_be_noticed(server: Any, tab: Any) -> None:
    flow = copy.deepcopy(json.loads(FLOWS[0].read_text("utf-8")))
    node = next(n for n in flow["nodes"] if n["type"].startswith("Tenuto_"))
    node["type"] = "Tenuto_Nothing"
    nodes = page.load(tab, flow)
    assert [n["known"] for n in nodes if n["type"] == "Tenuto_Nothing"] == [False]
    version = server.get("/system_stats")["system"]["comfyui_version"]
    if version.startswith("0.3."):  # newer pages say it elsewhere than in a dialog
        assert page.complaints(tab)


@pytest.mark.parametrize("path", FLOWS, ids=lambda path: path.stem)
def test_the_picture_is_of_this_file(path: Path) -> None:
    """Rendered anew by `python tests/hosts/server/page.py URL` whenever the file changes."""
    from PIL import Image

    with Image.open(path.with_suffix(".jpg")) as image:
        assert image.info["comment"].decode() == page.digest(path)
        assert image.width == page.WIDTH


def test_they_are_among_the_templates(server: Any) -> None:
    """The page lists them under the folder's name."""
    assert sorted(server.get("/workflow_templates")["ComfyUI-Tenuto.dev-1.0"]) == [
        path.stem for path in FLOWS
    ]
