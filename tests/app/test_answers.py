"""A choice that is answered late, as on a busy machine: what is typed after it stays."""

from __future__ import annotations

from typing import Any

import pytest

from tests.app.conftest import choose

pytestmark = pytest.mark.slow

LATE = 1.5  # seconds
HELD = "held"  # a file beside the output folder: while it is there, no answer comes at all
SLOW = f"""
import pathlib, time
from tenuto.cli.app import module

def late(place, name):
    def answer(*values, now=getattr(module(place), name)):
        while pathlib.Path({HELD!r}).exists():
            time.sleep(0.02)
        time.sleep({LATE})
        return now(*values)

    setattr(module(place), name, answer)

late("generate", "_model_chosen")
late("generate", "_artifact_chosen")
late("compare", "default_for")
late("speedup_fields", "safest")
"""


def typed(page: Any, place: str, value: str) -> None:
    """As a person does: the field is clicked, which waits until it can be, and written anew."""
    page.wait_for_timeout(500)  # nobody is faster
    page.click(f"{place} input[type=number]")
    page.keyboard.press("Control+a")
    page.keyboard.type(value)
    page.keyboard.press("Tab")


def test_what_is_typed_after_a_choice_stays(start: Any, visit: Any) -> None:
    with start(before=SLOW) as app:
        tab = visit(app)
        page = tab.page
        steps = "#steps input"
        typed(page, "#steps", "9")
        held = app.out.parent / HELD
        held.touch()
        choose(page, "#artifact", "none")
        page.focus("#prompt textarea")  # what no answer fills is free
        page.keyboard.type("x")
        assert "x" in page.input_value("#prompt textarea")
        assert page.locator("#steps[inert]").count() == 1
        held.unlink()
        typed(page, "#steps", "8")
        page.wait_for_timeout(1000 * LATE + 500)
        assert page.input_value(steps) == "8"

        choose(page, "#model", "demo:unet")
        typed(page, "#steps", "7")
        assert page.input_value("#artifact input").startswith("none")
        page.click("#artifact input")  # looked at and left: nothing is waited for
        page.click(steps)
        page.wait_for_timeout(300)
        assert page.evaluate("document.activeElement.closest('[id]').id") == "steps"
        page.wait_for_timeout(1000 * LATE)
        assert page.input_value(steps) == "7"

        tab.show("Compare")
        page.click("#compare-artifacts .token-remove")
        typed(page, "#compare-speedup", "2")
        page.wait_for_timeout(1000 * LATE + 500)
        assert page.input_value("#compare-speedup input[type=number]") == "2"
        page.click("#compare-speedup-auto")
        typed(page, "#compare-speedup", "3")
        page.wait_for_timeout(1000 * LATE + 500)
        assert page.input_value("#compare-speedup input[type=number]") == "3"
