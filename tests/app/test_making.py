"""In Chromium: several images of one press, and a list from which each is shown again."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

SEED = "document.querySelector('#infotext textarea')?.value.includes('Seed: {}')"


def count(app: Any) -> int:
    return len(list((app.out / "pictures").glob("three-of-them*.png")))


def test_images_of_one_press_are_kept_in_a_list(app: Any, visit: Any, findings: Any) -> None:
    """Their seeds follow each other; a choice shows image, numbers and settings; Stop ends all."""
    tab = visit(app, width=1400)
    page = tab.page
    page.fill("#prompt textarea", "three of them")
    for place, value in (("#steps", "2"), ("#seed", "41"), ("#count", "3")):
        page.fill(f"{place} input", value)
        page.keyboard.press("Tab")
    page.click("#generate")
    page.wait_for_selector("#generate-working [role=progressbar]")
    box, below = (page.locator(f"{p}").bounding_box() for p in ("#generate-working", "#model"))
    inner = page.locator("#generate-working [role=progressbar]").bounding_box()
    assert inner["y"] + inner["height"] <= box["y"] + box["height"] <= below["y"]
    page.wait_for_function(SEED.format(43))
    page.wait_for_function("document.querySelectorAll('#gallery img').length == 3")
    assert count(app) == 6, "each beside full precision"
    assert "seed 43" in tab.text("#gallery") and "dB" in tab.text("#gallery")
    shown = page.locator("#generate-slider img").first.get_attribute("src")
    page.focus("#gallery button >> nth=2")
    page.keyboard.press("Enter")
    page.wait_for_function(SEED.format(41))
    page.wait_for_function(
        "shown => document.querySelector('#generate-slider img').src != shown", arg=shown
    )
    assert "PSNR" in tab.text("#numbers") and not findings(page)

    page.wait_for_function("!document.querySelector('#generate').disabled")
    for place, value in (("#steps", "40"), ("#count", "50")):
        page.fill(f"{place} input", value)
        page.keyboard.press("Tab")
    page.click("#generate")
    page.wait_for_function("!document.querySelector('#generate-stop').disabled")
    page.wait_for_timeout(1000)
    page.click("#generate-stop")
    page.wait_for_selector("#numbers [data-state=stopped]")
    page.wait_for_function("!document.querySelector('#generate').disabled")
    assert count(app) < 20

    page.fill("#count input", "0")
    page.keyboard.press("Tab")
    page.click("#generate")
    page.wait_for_selector("#numbers [data-state=failed]")
    assert "The number of images is a number from 1 to 64, not 0." in tab.text("#numbers")
