"""Renders docs/webui.png again: the accordion, ticked, in the Gradio that A1111 has.

    python -m venv DIR
    DIR/bin/pip install gradio==3.41.2 "pydantic<2" "fastapi<0.95" "httpx<0.25" \
        "huggingface_hub<0.26" "numpy<2" torch safetensors playwright
    PYTHONPATH=core DIR/bin/python tests/webui/screenshot.py

The host is a stub. What A1111 puts round the fields of Gradio (a checkbox in the accordion's head,
small buttons, no borders) is made anew here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 640
CSS = """
.block, .form, .group { border-width: 0 !important; box-shadow: none !important }
.form { background: none !important; gap: .5em !important }
.block:not(.tenuto) { padding: 0 !important; background: none !important }
.tenuto { border: 1px solid var(--border-color-primary) !important; padding: 8px !important }
.tenuto .gap, .tenuto .row { gap: .75em !important }
.tool { max-width: 2.4em; min-width: 2.4em !important; align-self: end }
footer { display: none !important }
"""


def sibling(name: str) -> Any:
    """A file beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(folder: Path) -> Any:
    """The extension's accordion as Gradio's page."""
    import gradio as gr

    class Accordion(gr.Checkbox):
        """A checkbox and an accordion: what is made inside of it is in the accordion."""

        def __init__(self, value: bool, label: str, elem_id: str) -> None:
            super().__init__(value, label=label, elem_id=elem_id)
            self.below = gr.Column()

        def get_block_name(self) -> str:
            return "checkbox"

        def __enter__(self) -> Any:
            self.below.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.below.__exit__(*error)

    def small(value: str, elem_id: str) -> Any:
        return gr.Button(value, elem_id=elem_id, elem_classes="tool")

    host = sibling("hosts").Host("a1111", sibling("unets").unet("a1111"), folder)
    parts = host.modules["modules.ui_components"]
    parts.InputAccordion, parts.ToolButton = Accordion, small
    host.modules.pop("gradio")
    sys.modules.update(host.modules)
    with gr.Blocks(css=CSS, analytics_enabled=False) as made, gr.Column(elem_classes="tenuto"):
        host.load()
    return made


def main() -> None:
    """Writes the image."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        made = page(Path(folder))
        _, url, _ = made.launch(prevent_thread_lock=True, show_api=False, quiet=True)
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        shown = browser.new_page(
            viewport={"width": WIDTH, "height": 1200}, device_scale_factor=1.25,
            color_scheme="light",
        )  # fmt: skip
        shown.goto(f"{url}?__theme=light")
        shown.get_by_label("Tenuto", exact=True).check()
        shown.wait_for_selector("text=calls are skipped, in runs of")
        shown.wait_for_timeout(700)
        target = ROOT / "docs" / "webui.png"
        shown.locator(".tenuto").first.screenshot(path=target)
        print(target, target.stat().st_size)
        browser.close()
        made.close()


if __name__ == "__main__":
    main()
