"""ComfyUI's own page in Chromium: loads a workflow, looks at its nodes, takes its image.

    python page.py URL [NAME...]    renders the images of example_workflows/, of all by default

An image has the hash of its workflow in its comment: a test compares the two.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[3] / "example_workflows"
WIDTH, MENU = 1600, (80, 140)  # of an image; what the page's menus take at its left and top
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False, "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False, "Comfy.LinkRelease.Action": "no action",
}  # fmt: skip
LOAD = """async (flow) => {
    await window.app.loadGraphData(flow, true, true)
    await new Promise((done) => setTimeout(done, 1500))
    return window.app.graph.nodes.map((node) => ({
        type: node.type, known: node.type in LiteGraph.registered_node_types,
        red: Boolean(node.has_errors), title: node.title,
        box: [...node.getBounding()],
        inputs: (node.inputs || []).map((slot) => [slot.name, slot.link !== null]),
        widgets: (node.widgets || []).map((widget) => [widget.name, widget.value]),
    }))
}"""
FRAME = """([left, top, width, height, x, y, scale]) => {
    const canvas = window.app.canvas
    canvas.ds.scale = scale
    canvas.ds.offset = [x / scale - left, y / scale - top]
    canvas.setDirty(true, true)
}"""


def chromium() -> str | None:
    """The browser, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The page, ready, without what greets a first visit."""
    from playwright.sync_api import sync_playwright

    request = urllib.request.Request(
        f"{url}/settings", json.dumps(SETTINGS).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request):
        pass
    with sync_playwright() as play:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = play.chromium.launch(executable_path=chromium(), args=flags)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(url)
        page.wait_for_function("window.app?.graph && window.app?.canvas", timeout=60_000)
        page.wait_for_timeout(2500)
        yield page
        browser.close()


def load(page: Any, flow: dict[str, Any]) -> list[dict[str, Any]]:
    """Facts of every node of a workflow as the page has them."""
    return page.evaluate(LOAD, flow)


def complaints(page: Any) -> list[str]:
    """What the page says in messages and dialogs, such as a workflow that is not valid."""
    return [box.inner_text() for box in page.locator(".p-toast-message, .p-dialog").all()]


def picture(page: Any, nodes: list[dict[str, Any]]) -> bytes:
    """A PNG of the nodes, without the menus: they lie left of and above what is cut out."""
    boxes = [node["box"] for node in nodes]
    left, top = min(b[0] for b in boxes) - 30, min(b[1] for b in boxes) - 30
    right, bottom = max(b[0] + b[2] for b in boxes) + 30, max(b[1] + b[3] for b in boxes) + 30
    scale = WIDTH / (right - left)
    high = round((bottom - top) * scale)
    page.set_viewport_size({"width": WIDTH + MENU[0], "height": high + MENU[1]})
    page.wait_for_timeout(500)
    page.evaluate(FRAME, [left, top, right - left, bottom - top, *MENU, scale])
    page.wait_for_timeout(1000)
    clip = {"x": MENU[0], "y": MENU[1], "width": WIDTH, "height": high}
    return page.screenshot(clip=clip)


def digest(path: Path) -> str:
    """Of a workflow, however its lines end."""
    return hashlib.sha256(json.dumps(json.loads(path.read_text("utf-8"))).encode()).hexdigest()


def main(url: str, *names: str) -> None:
    """Render images anew."""
    from PIL import Image

    for path in [p for p in sorted(WORKFLOWS.glob("*.json")) if not names or p.stem in names]:
        with opened(url) as page:
            found = picture(page, load(page, json.loads(path.read_text("utf-8"))))
        image = Image.open(io.BytesIO(found)).convert("RGB")
        image.save(path.with_suffix(".jpg"), quality=88, comment=digest(path).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
