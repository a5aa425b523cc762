"""What anyone can see and reach: axe-core's rules, and every job by the keyboard alone."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from tests.app.conftest import choose

from .test_browser import TABS, wait

pytestmark = pytest.mark.slow

SIZES = ((1400, 900), (390, 844))


def open_all(tab: Any) -> None:
    """What is folded, in the tab Generate for a pipeline that takes images."""
    page = tab.page
    if page.locator("#export-model").is_visible():  # nothing is folded there
        return
    if page.locator("#model").is_visible():
        choose(page, "#model", "mine/inpaint")
    own = page.get_by_text("The pipeline's own settings").locator("visible=true")
    own.wait_for()
    for more in (*page.get_by_text("All options").locator("visible=true").all(), own):
        more.click()
    if page.locator("#model").is_visible():
        page.wait_for_selector("#generate-mask")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(app: Any, visit: Any, findings: Any, dark: bool) -> None:
    """In every tab, all of it unfolded, and with an image; and nothing scrolls sideways.

    Each on a wide screen and then on a phone.
    """
    tab = visit(app, dark=dark, width=SIZES[0][0], height=SIZES[0][1])
    page = tab.page
    assert page.get_attribute("html", "lang") and page.title() == "Tenuto"
    wrong = []

    def look(name: str) -> None:
        for width, height in SIZES[::-1]:  # it goes on where it is wide
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_function(f"innerWidth == {width}")
            page.wait_for_timeout(300)
            wrong.extend(f"{name}, {width}: {line}" for line in findings(page))
            wide = page.evaluate("document.documentElement.scrollWidth")
            wrong.extend([f"{name}, {width}: {wide} pixels wide"] * (wide > width))

    for name in TABS:
        tab.show(name)
        open_all(tab)
        look(name)
    tab.show("Generate")
    choose(page, "#model", "demo:transformer")
    choose(page, "#artifact", "shipped:")
    page.wait_for_timeout(500)
    page.click("#steps input")
    page.keyboard.press("Control+a")
    page.keyboard.type("1")
    page.click("#generate")
    page.wait_for_selector("#generate-slider img")
    page.wait_for_selector("#numbers table")
    page.wait_for_timeout(500)
    look("an image")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("size", SIZES, ids=["wide", "phone"])
def test_the_keyboard_is_enough(app: Any, visit: Any, size: tuple[int, int]) -> None:
    """From the prompt by Tab to Generate; the divider by its own slider; the focus is seen."""
    tab = visit(app, width=size[0], height=size[1])
    page = tab.page
    page.fill("#steps input[type=number]", "1")
    page.focus("#prompt textarea")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "generate"
    look = page.evaluate(
        "(() => { const s = getComputedStyle(document.activeElement);"
        " return s.outlineStyle + s.boxShadow })()"
    )
    assert look not in ("nonenone", "none")
    page.keyboard.press("Enter")
    page.wait_for_selector("#generate-slider img")
    page.focus("#generate-place input[type=range]")
    before = page.evaluate("document.querySelector('#generate-slider').innerHTML")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "before => document.querySelector('#generate-slider').innerHTML != before", arg=before
    )


def reach(page: Any, place: str) -> None:
    """By Tab alone."""
    for _ in range(150):
        page.keyboard.press("Tab")
        if page.evaluate("place => !!document.activeElement.closest(place)", place):
            return
    raise AssertionError(f"{place} is not reached by the keyboard")


def press(page: Any, place: str) -> None:
    """Reach a button that can be pressed by now, and press it."""
    page.wait_for_function("place => !document.querySelector(place).disabled", arg=place)
    reach(page, place)
    page.keyboard.press("Enter")


def go_to(page: Any, name: str) -> None:
    """Choose a tab by the keyboard; one that a narrow window has no room for is in a menu."""
    places = page.evaluate(
        "name => [...document.querySelectorAll('[role=tab], .overflow-dropdown button')]"
        ".filter(b => b.innerText.trim() === name && b.offsetParent).map(b => b.role)",
        name,
    )
    if "tab" in places:
        press(page, f"[data-tab-id={name.lower()}]")
    else:
        press(page, ".overflow-menu > button")
        for _ in range(10):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.innerText?.trim()") == name:
                break
        page.keyboard.press("Enter")
    page.wait_for_selector(f"#{name.lower()}-start", state="visible")


@pytest.mark.parametrize("size", SIZES, ids=["wide", "phone"])
def test_every_job_by_the_keyboard_alone(app: Any, visit: Any, size: tuple[int, int]) -> None:
    """A calibration begun, stopped and thrown away; a comparison; an export."""
    tab = visit(app, width=size[0], height=size[1])
    page = tab.page
    go_to(page, "Calibrate")
    reach(page, "#calibrate-name")
    page.keyboard.press("Control+a")
    page.keyboard.type("by-keyboard")
    press(page, "#calibrate-start")
    wait(tab, "running")
    press(page, "#calibrate-stop")
    wait(tab, "stopped")
    press(page, "#calibrate-discard")
    page.wait_for_selector("#calibrate-sure-yes", state="visible")
    press(page, "#calibrate-sure-yes")
    page.wait_for_selector("#calibrate-sure-yes", state="hidden")
    for _ in range(100):  # the question goes at once, files by another answer
        with suppress(FileNotFoundError):  # a folder that goes while it is looked into
            if not list(app.out.glob("**/by-keyboard*.json")):
                break
        page.wait_for_timeout(100)
    assert not list(app.out.glob("**/by-keyboard*.json"))

    go_to(page, "Compare")
    press(page, "#compare-start")
    wait(tab, "running", "#compare-status")
    press(page, "#compare-stop")
    wait(tab, "stopped", "#compare-status")

    go_to(page, "Export")
    reach(page, "#export-to")
    page.keyboard.press("Tab")  # Gradio's radios are reached one by one
    page.keyboard.press("Space")
    press(page, "#export-start")
    wait(tab, "running", "#export-status")
    press(page, "#export-stop")
    wait(tab, "stopped", "#export-status")
    assert not list((app.out / "exports").glob("*.safetensors"))
    # Gradio 6.31's own: a list of options that was passed by the keyboard, and is emptied
    tab.complaints[:] = [said for said in tab.complaints if "(reading '0')" not in said]
