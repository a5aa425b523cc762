"""Each template of a family in ComfyUI's own page, and run as the page sends it.

The files that it asks for are tiny ones under the names of the real ones (template_files.py): the
host's own loaders, text encoders, sampler and decoder take them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__)
TINY = {"v1-5-pruned-emaonly-fp16": "tiny_sd15", "sd3.5_large_fp8_scaled": "tiny_sd3"}
NEEDS = {  # module and class of the host's that a template cannot do without
    "flux2-klein": ("comfy.text_encoders.flux", "KleinTokenizer"),
}
STEPS = 10  # the slider skips half of nine and more
SIZES = {"width": 64, "height": 64, "length": 5}  # of what is sampled here
API = "async () => (await window.app.graphToPrompt()).output"


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"tenuto_{name}", HERE.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses ask for it
    spec.loader.exec_module(module)
    return module


page, templates = _script("page"), _script("templates")
NAMES = list(templates.templates())


@pytest.fixture
def flow(server: Any, checkpoints: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The workflow of a template, while its files are there; they are gone afterwards (2 GB)."""
    module, kind = NEEDS.get(request.param, ("builtins", "object"))
    if not hasattr(importlib.import_module(module), kind):
        pytest.skip(f"{request.param} needs a newer ComfyUI, such as 0.33: this one has no {kind}")
    template, models = templates.templates()[request.param], server.base / "models"
    wanted, made = [], []
    for file in template.files:
        path = models / file.directory / file.name
        path.parent.mkdir(exist_ok=True)
        made.append(path)
        if path.stem in TINY:
            path.symlink_to(checkpoints / file.directory / f"{TINY[path.stem]}.safetensors")
        else:
            wanted.append(f"{file.directory}/{file.name}")
    try:
        if wanted:
            script, root = HERE.with_name("template_files.py"), os.environ["TENUTO_COMFYUI"]
            subprocess.run(
                [sys.executable, "-W", "ignore", script, root, models, *wanted], check=True
            )
        path = templates.FOLDER / f"tenuto-speed-up-{request.param}.json"
        yield json.loads(path.read_text("utf-8"))
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def test_they_are_what_the_script_writes() -> None:
    written = dict(templates.written())
    assert {path: path.read_text("utf-8") for path in written} == written
    shipped = {path for path in templates.FOLDER.glob("*.json") if "speed-up" in path.stem}
    assert shipped == set(written)


def test_files_are_told(server: Any) -> None:
    """To the page in the loaders, in a folder that the host has; to readers in the docs."""
    text = (templates.FOLDER.parent / "docs" / "comfyui.md").read_text("utf-8")
    folders = server.get("/models")
    for name, template in templates.templates().items():
        (row,) = (
            line for line in text.splitlines() if line.startswith(f"| [tenuto-speed-up-{name}]")
        )
        told = [
            (file, node["widgets_values"])
            for node in templates.built(name, template)["nodes"]
            for file in node["properties"].get("models", ())
        ]
        assert len(told) == len(template.files)
        for file, values in told:
            assert file["name"] in values and file["directory"] in folders
            assert file["url"].endswith(f"/{file['name']}") and f"`{file['name']}`" in row


def test_the_script_knows_the_nodes(server: Any) -> None:
    """What goes into and comes out of each node, in the host's own words."""
    known = server.get("/object_info")
    for kind, (linked, fields, out, _) in templates.KINDS.items():
        if kind == "MarkdownNote":
            continue
        theirs = known[kind]["input"].get("required", {}) | known[kind]["input"].get("optional", {})
        for name, what in templates.slots(f"{linked} {fields}"):
            if name:
                found = theirs[name][0]  # a list is one of choices; newer hosts have two more kinds
                choice = isinstance(found, list) or "COMBO" in found
                assert what in ("*", "COMBO" if choice else found), (kind, name)
        assert known[kind]["output"][: len(out.split())] == [t for _, t in templates.slots(out)]


@pytest.mark.slow
@pytest.mark.parametrize("flow", NAMES, indirect=True)
def test_it_opens_and_runs(server: Any, flow: Any) -> None:
    """No node is missing, red or upon another; with nothing but the files half is skipped."""
    if page.chromium() is None:
        pytest.skip("there is no Chromium: apt install chromium")
    with page.opened(f"http://127.0.0.1:{server.port}") as tab:
        nodes = page.load(tab, flow)
        assert [n["type"] for n in nodes] == [n["type"] for n in flow["nodes"]]
        assert not [n["type"] for n in nodes if not n["known"] or n["red"]]
        assert not page.complaints(tab)
        assert not list(overlaps(nodes))
        for node, wanted in zip(nodes, flow["nodes"], strict=True):
            there = [value for _, value in node["widgets"]][: len(wanted["widgets_values"])]
            assert there == wanted["widgets_values"], node["type"]
        graph = tab.evaluate(API)
    for node in graph.values():
        inputs = node["inputs"]
        inputs |= {key: value for key, value in SIZES.items() if key in inputs}
        inputs |= {"steps": STEPS} if "steps" in inputs else {}
    history = server.run(graph)
    (report,) = (key for key, node in graph.items() if node["class_type"] == "Tenuto_Report")
    (text,) = history["outputs"][report]["text"]
    skipped, calls = map(
        int, re.findall(r"Cache: (\d+) of (\d+) calls of the model skipped", text)[0]
    )
    assert skipped * 2 == calls and calls >= STEPS, text
    (saved,) = (key for key, node in graph.items() if node["class_type"].startswith("Save"))
    assert history["outputs"][saved]["images"], "videos too are called so"
    if "SaveImage" in graph[saved]["class_type"]:
        assert server.picture(history, saved).float().std() > 1, "it is no single colour"


def overlaps(nodes: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Pairs of nodes of which one covers some of the other."""
    for number, one in enumerate(nodes):
        x, y, wide, high = one["box"]
        for other in nodes[number + 1 :]:
            left, top, more, below = other["box"]
            if x < left + more and left < x + wide and y < top + below and top < y + high:
                yield one["type"], other["type"]
