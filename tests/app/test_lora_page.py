"""In Chromium: the field for LoRAs is there where a model takes them, and is filled again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tenuto as tn
from tests.app.conftest import ANSWERED, choose, restore
from tests.core import lora_files

pytestmark = pytest.mark.slow

FIELD = "#generate-loras textarea"
HAS = "([place, text]) => document.querySelector(place)?.value === text"


@pytest.fixture
def style(app: Any) -> Iterator[Path]:
    """A LoRA below the app's folder of models."""
    file = app.roots / "loras" / "style.safetensors"
    file.parent.mkdir()
    yield lora_files.lora_file(tn.demo("unet").unet, file)
    file.unlink()
    file.parent.rmdir()


def test_loras_in_generate_and_compare(app: Any, visit: Any, style: Path) -> None:
    """Refused beside the button, used, restored from the image, and there after a reload."""
    tab = visit(app)
    page = tab.page
    assert page.locator("#generate-loras").count() == 0, "PixArt takes none"
    choose(page, "#model", "demo:unet")
    page.wait_for_selector(FIELD)
    page.wait_for_function(ANSWERED)
    assert "There are: style" in tab.text("#generate-loras")
    page.fill("#steps input", "1")
    page.fill(FIELD, "styl")
    page.click("#generate")
    page.wait_for_selector("#numbers [data-state=failed]")
    assert "There is no LoRA 'styl' in the folders of models." in tab.text("#numbers")
    page.wait_for_function("!document.querySelector('#generate').disabled")
    page.fill(FIELD, "style:0.5")
    page.click("#generate")
    page.wait_for_function(
        "document.querySelector('#infotext textarea')?.value.includes('\"style:0.5\"')"
    )
    newest = max((app.out / "pictures").glob("*.png"), key=lambda p: p.stat().st_mtime_ns)

    page.reload()
    page.wait_for_selector(".gradio-container[data-tenuto=ready]")
    restore(page, newest)
    assert "LoRAs" in tab.text("#aside-said")
    page.wait_for_selector(FIELD)
    page.wait_for_function(HAS, arg=[FIELD, "style:0.5"])

    tab.show("Compare")
    choose(page, "#compare-model", "demo:unet")
    field = "#compare-loras textarea"
    page.wait_for_selector(field)
    page.wait_for_function(ANSWERED)
    choose(page, "#compare-artifacts", "shipped:demo-unet.w8a8")
    page.keyboard.press("Escape")
    page.wait_for_function(ANSWERED)
    page.fill("#compare-count input", "512")
    page.fill(field, "style:0.25")
    page.click("#compare-start")
    page.wait_for_selector("#compare-status [data-state=running]")
    assert "LoRA style:0.25" in tab.text("#compare-status")
    page.reload()
    page.wait_for_selector(".gradio-container[data-tenuto=ready]")
    tab.show("Compare")
    page.wait_for_selector(field)
    page.wait_for_function(HAS, arg=[field, "style:0.25"])
    page.click("#compare-stop")
    page.wait_for_selector("#compare-status [data-state=stopped]")
