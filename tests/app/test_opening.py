"""A page whose own questions are answered late, as on a busy machine."""

from __future__ import annotations

import time
from typing import Any

import pytest
from playwright import sync_api as playwright

from .test_browser import fill, wait

pytestmark = pytest.mark.slow

LATE = 2  # seconds
HELD = "held"  # a file beside the output folder: while it is there, no answer comes at all
SLOW = f"""
import pathlib, time
from tenuto.cli.app import module
fields = module("calibrate_fields")

def late(*values, answer=fields.filled):
    while pathlib.Path({HELD!r}).exists():
        time.sleep(0.02)
    time.sleep({LATE})
    return answer(*values)

fields.filled = late
"""


def test_nothing_is_typed_or_begun_before_the_page_is_there(start: Any, visit: Any) -> None:
    """What was typed earlier would be shown and not used, and Start would not be followed."""
    with start(before=SLOW) as app:
        began = time.monotonic()
        tab = visit(app)
        assert time.monotonic() - began > LATE
        begin(tab, "first")
        tab.page.click("#calibrate-stop")
        wait(tab, "stopped")

        held = app.out.parent / HELD
        held.touch()
        tab.page.reload()
        tab.page.wait_for_selector("#generate")
        with pytest.raises(playwright.TimeoutError):
            tab.page.click("#generate", timeout=1000)
        tab.page.keyboard.press("Tab")
        assert tab.page.evaluate("document.activeElement === document.body")
        held.unlink()
        begin(tab, "second")
        tab.page.close()


TEXT = "document.querySelector('#calibrate-status').innerText"


def begin(tab: Any, name: str) -> None:
    """A calibration that takes longer than the answer; the page goes on looking at it."""
    tab.show("Calibrate")  # waits until it can be clicked
    fill(tab, name, model="demo:transformer")
    tab.page.click("#calibrate-start")
    wait(tab, "running")
    for _ in range(2):
        seen = tab.page.evaluate(TEXT)
        assert f"{name}.safetensors" in seen
        tab.page.wait_for_function(f"seen => {TEXT} !== seen", arg=seen)
    wait(tab, "running")
