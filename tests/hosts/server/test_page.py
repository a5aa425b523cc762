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
ALONE = """async () => {
    window.app.graph.clear()
    for (const kind of Object.keys(LiteGraph.registered_node_types))
        if (kind.startsWith("Tenuto_")) window.app.graph.add(LiteGraph.createNode(kind))
    await new Promise((done) => setTimeout(done, 500))
    const pen = document.createElement("canvas").getContext("2d")
    pen.font = `${LiteGraph.NODE_TEXT_SIZE}px Arial`
    return window.app.graph.nodes.map((node) => ({
        type: node.type, width: node.size[0],
        title: pen.measureText(node.title).width + 2 * LiteGraph.NODE_TITLE_HEIGHT,
        widgets: Object.fromEntries((node.widgets || []).map((w) => [w.name, w.value ?? null])),
    }))
}"""
RUN = """async () => {
    await window.app.queuePrompt(0, 1)
    const shown = (node) => node.widgets?.find((one) => one.name === "shown")
    const reports = window.app.graph.nodes.filter((node) => node.type === "Tenuto_Report")
    for (let i = 0; i < 600 && !reports.some((node) => shown(node)?.value); i++)
        await new Promise((done) => setTimeout(done, 100))
    const sent = (await window.app.graphToPrompt()).output
    return reports.map((node) => [shown(node)?.value ?? null, sent[node.id].inputs])
}"""


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


OWN = [path for path in FLOWS if "speed-up" not in path.stem]  # the others: test_templates.py


def test_there_are_two_that_use_an_artifact() -> None:
    assert [path.stem for path in OWN] == ["tenuto-calibrate", "tenuto-use"]


def test_they_go_with_each_other_and_with_the_page_that_names_them() -> None:
    """docs/faster-in-comfyui.md: SDXL, at the settings of its template, and plain W8A8."""
    said = (HERE.parents[3] / "docs" / "faster-in-comfyui.md").read_text("utf-8")
    assert "to the scheme `W8A8`" in said and "It is set to SDXL, to 25 steps" in said
    names = ("tenuto-speed-up-sdxl", "tenuto-calibrate", "tenuto-use")
    flows = [{n["type"]: n.get("widgets_values") for n in json.loads(p.read_text("utf-8"))["nodes"]}
             for name in names for p in FLOWS if p.stem == name]  # fmt: skip
    for kind in ("CheckpointLoaderSimple", "EmptyLatentImage"):
        assert len({json.dumps(flow[kind]) for flow in flows}) == 1, kind
    one, made, use = flows
    assert made["Tenuto_Calibrate"][1] == "W8A8"
    assert use["Tenuto_LoadArtifact"] == [f"{made['Tenuto_Calibrate'][0]}.safetensors"]
    how = one["KSampler"][2:6]  # steps, cfg, sampler_name, scheduler
    assert use["KSampler"][2:6] == how == made["Tenuto_Calibrate"][7:]


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
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


def test_every_node_alone(server: Any, tab: Any) -> None:
    """At its first size the whole title is seen; no field is undefined."""
    nodes = {node["type"]: node for node in tab.evaluate(ALONE)}
    assert len(nodes) >= 10
    assert not [kind for kind, node in nodes.items() if node["width"] < node["title"]]
    assert not [kind for kind, node in nodes.items() if None in node["widgets"].values()]
    prompts = sorted(p.name for p in (server.base / "models" / "tenuto_prompts").glob("*.*"))
    assert nodes["Tenuto_LoadPrompt"]["widgets"]["name"] in (prompts or ["no file yet"])
    # Another seed would be another calibration: it could not go on where it was stopped.
    assert nodes["Tenuto_Calibrate"]["widgets"]["control_after_generate"] == "fixed"


def test_a_list_without_files(server: Any, make: Any) -> None:
    for kind, folder in (("LoadPrompt", "tenuto_prompts"), ("LoadArtifact", "tenuto")):
        ours = make.node(f"Tenuto_{kind}", name="no file yet")
        said = server.refused({"1": ours, "2": make.node("PreviewAny", source=["1", 1])})
        assert f"There is no file in models/{folder} yet: " in said


@pytest.mark.slow
def test_a_report_shows_itself_unless_another_node_does(tab: Any) -> None:
    flow = json.loads(FLOWS[0].with_name("tenuto-speed-up-sd15.json").read_text("utf-8"))
    nodes = {node["type"]: node for node in flow["nodes"]}
    nodes["CheckpointLoaderSimple"]["widgets_values"] = ["tiny_sd15.safetensors"]
    nodes["EmptyLatentImage"]["widgets_values"] = [64, 64, 1]
    nodes["KSampler"]["widgets_values"][2] = 9
    twin = copy.deepcopy(nodes["Tenuto_Report"]) | {"id": 100, "pos": [2000, 0]}
    for slot, (kind, link) in enumerate({"Tenuto_SpeedUp": 100, "KSampler": 101}.items()):
        output = nodes[kind]["outputs"][0]
        output["links"].append(link)
        twin["inputs"][slot]["link"] = link
        flow["links"].append([link, nodes[kind]["id"], 0, 100, slot, output["type"]])
    twin["outputs"][0]["links"] = []
    flow["nodes"].append(twin)
    page.load(tab, flow)
    (linked, _), (alone, sent) = tab.evaluate(RUN)
    assert linked is None and "calls of the model skipped and forecast" in alone
    assert sorted(sent) == ["model", "samples"], "what is shown is not sent"


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
