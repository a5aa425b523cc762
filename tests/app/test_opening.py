"""A page whose own questions are answered late, as on a busy machine."""

from __future__ import annotations

import time
from typing import Any

import pytest
from playwright import sync_api as playwright

from .test_browser import fill, wait

pytestmark = pytest.mark.slow

LATE = 6  # seconds
SLOW = f"""
import time
from tenuto.cli.app import module
fields = module("calibrate_fields")

def late(*values, answer=fields.filled):
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

        tab.page.reload()
        tab.page.wait_for_selector("#generate")
        with pytest.raises(playwright.TimeoutError):
            tab.page.click("#generate", timeout=1000)
        tab.page.keyboard.press("Tab")
        assert tab.page.evaluate("document.activeElement === document.body")
        tab.show("Calibrate")  # waits until it can be clicked
        begin(tab, "second")
        tab.page.wait_for_selector("#calibrate-map svg[data-cells='162']")
        tab.page.close()


def begin(tab: Any, name: str) -> None:
    """A calibration that takes longer than the answer."""
    tab.show("Calibrate")
    fill(tab, name)
    tab.page.click("#calibrate-start")
    wait(tab, "running")
