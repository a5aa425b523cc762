"""In Chromium: the page changes what was chosen alone, tells what runs, and stays where it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.app.conftest import choose, number_of
from tests.patience import PATIENCE

pytestmark = pytest.mark.slow

TABS = ("Generate", "Calibrate", "Compare", "Export")
LISTS = (
    "#model", "#artifact", "#calibrate-model", "#calibrate-scheme", "#calibrate-rounding",
    "#calibrate-method", "#unfinished", "#compare-model", "#compare-artifacts",
    "#export-model", "#export-artifact",
)  # fmt: skip
VALUES = """
() => [...document.querySelectorAll('input, textarea')].filter(e => e.offsetParent !== null
  && e.type !== 'file').map(e => {
    const box = e.closest('.block') || e;
    const tokens = [...box.querySelectorAll('.token')].map(t => t.innerText);
    const checked = ['checkbox', 'radio'].includes(e.type) ? e.checked : e.value;
    return [box.id, e.type, String(checked), tokens.join()].join(' | ');
  })
"""


def settled(page: Any) -> list[str]:
    """The values of all fields that are seen, once they stay as they are."""
    before, now = None, page.evaluate(VALUES)
    while before != now:
        page.wait_for_timeout(700)
        before, now = now, page.evaluate(VALUES)
    return now


def open_all(tab: Any) -> None:
    """What is folded in a tab, but for where files are dropped."""
    for name in ("All options", "The pipeline's own settings"):
        for more in tab.page.get_by_text(name).locator("visible=true").all():
            more.click()


def number(page: Any, place: str, value: str) -> None:
    page.fill(f"{place} input", value)
    page.keyboard.press("Tab")


def test_looking_at_lists_changes_nothing(app: Any, visit: Any) -> None:
    """Each list of each tab is opened and left, by the mouse and by the keyboard."""
    tab = visit(app)
    page = tab.page
    number(page, "#steps", "8")
    page.fill("#guidance textarea, #guidance input", "3.5")
    for name in TABS:
        tab.show(name)
        open_all(tab)
        before = settled(page)
        assert len(before) > 5
        lists = page.locator(", ".join(f"{place} input" for place in LISTS))
        boxes = [b for b in lists.all() if b.is_visible() and b.is_enabled()]
        assert len(boxes) >= 2, name
        for box in boxes:
            box.click()
            page.wait_for_timeout(150)
            page.locator("h1").click()
            box.focus()
            page.keyboard.press("Tab")
        assert settled(page) == before, name


def test_a_choice_still_changes_what_belongs_to_it(app: Any, visit: Any) -> None:
    """Another model: its steps, and none of the artifacts of the one before."""
    tab = visit(app)
    page = tab.page
    assert page.input_value("#artifact input").startswith("shipped:")
    number(page, "#steps", "8")
    choose(page, "#model", "demo:unet")
    page.wait_for_function("document.querySelector('#artifact input').value.startsWith('none')")
    assert page.input_value("#steps input") == "20"
    number(page, "#steps", "9")
    choose(page, "#artifact", "shipped:demo-unet.w8a8")
    page.wait_for_function("document.querySelector('#steps input').value == '20'")
    tab.show("Compare")
    choose(page, "#compare-model", "demo:unet")
    page.wait_for_function("!document.querySelector('#compare-artifacts .token')")


def started(tab: Any, name: str) -> None:
    """A calibration that takes a while, with other settings than the page begins with."""
    page = tab.page
    tab.show("Calibrate")
    choose(page, "#calibrate-model", "demo:unet")
    choose(page, "#calibrate-scheme", re.compile("^W4A8: "))
    page.fill("#calibrate-reuse input[type=number]", "45")
    page.fill("#calibrate-name textarea, #calibrate-name input", name)
    page.get_by_text("The pipeline's own settings").locator("visible=true").click()
    page.fill("#calibrate-negative textarea", "blur")
    page.fill("#calibrate-more textarea", "guidance_rescale = 0.1")
    page.click("#calibrate-start")
    page.wait_for_selector("#calibrate-status [data-state=running]")


SHARE = "Number(document.querySelector('#calibrate-status [role=progressbar]')?.ariaValueNow)"


def test_a_reload_shows_what_is_running(app: Any, visit: Any, findings: Any) -> None:
    """In the fields and in the card; the card says it when the job is over, too."""
    tab = visit(app)
    page = tab.page
    started(tab, "seen-again")
    assert not findings(page), "while it runs"
    other = visit(app)  # another tab of the browser sees it
    other.show("Calibrate")
    other.page.wait_for_selector("#calibrate-status [data-state=running]")
    other.page.close()
    said = (
        "demo:unet, w4a8, 45% reuse, quick, to seen-again.safetensors, negative_prompt blur, "
        "guidance_rescale 0.1"
    )
    assert said in tab.text("#calibrate-status")
    page.reload()
    page.wait_for_selector("#generate")
    tab.show("Calibrate")
    page.wait_for_selector("#calibrate-status [data-state=running]")
    assert said in tab.text("#calibrate-status")
    page.wait_for_function("document.querySelector('#calibrate-model input').value == 'demo:unet'")
    assert page.input_value("#calibrate-scheme input").startswith("W4A8")
    assert page.input_value("#calibrate-reuse input[type=number]") == "45"
    assert page.input_value("#calibrate-name textarea, #calibrate-name input") == "seen-again"
    assert page.input_value("#calibrate-negative textarea") == "blur"
    assert page.input_value("#calibrate-more textarea") == "guidance_rescale = 0.1"
    first = page.evaluate(SHARE)
    page.wait_for_function(f"first => {SHARE} != first", arg=first)  # it is followed

    page.click("#calibrate-stop")
    page.wait_for_selector("#calibrate-status [data-state=stopped]")
    assert said in tab.text("#calibrate-status")

    page.click("#calibrate-discard")  # it asks
    page.wait_for_selector("#calibrate-sure-no", state="visible")
    assert "lost" in tab.text("#calibrate-sure")
    page.click("#calibrate-sure-no")
    page.wait_for_selector("#calibrate-sure-no", state="hidden")
    assert (app.out / "unfinished" / "seen-again.json").exists()
    page.click("#calibrate-discard")
    page.click("#calibrate-sure-yes")
    page.wait_for_function("document.querySelector('#unfinished input').value != 'seen-again'")
    assert not (app.out / "unfinished" / "seen-again.json").exists()
    assert not (app.out / "seen-again.work").exists()


def test_a_reload_shows_the_comparison_that_runs(app: Any, visit: Any) -> None:
    tab = visit(app)
    page = tab.page
    tab.show("Compare")
    number(page, "#compare-count", "200")
    page.click("#compare-start")
    page.wait_for_selector("#compare-status [data-state=running]")
    artifact = tab.text("#compare-artifacts .token")
    said = f"demo:transformer, {artifact}, 200 images"
    page.reload()
    page.wait_for_selector("#generate")
    tab.show("Compare")
    page.wait_for_selector("#compare-status [data-state=running]")
    assert said in tab.text("#compare-status")
    page.wait_for_function("document.querySelector('#compare-count input').value == '200'")
    assert tab.text("#compare-artifacts .token") == artifact
    page.click("#compare-stop")
    page.wait_for_selector("#compare-status [data-state=stopped]")
    assert said in tab.text("#compare-status")


def test_one_message_is_seen_at_a_time(app: Any, visit: Any) -> None:
    """The newest of what goes wrong with the server itself; refusals are beside their button."""
    tab = visit(app)
    page = tab.page
    count, own = 0, number_of(page, "#compare-start")

    def failed(route: Any) -> None:
        nonlocal count
        if json.loads(route.request.post_data or "{}").get("trigger_id") != own:
            route.continue_()  # what the tab itself still asks for
            return
        count += 1
        route.fulfill(status=500, json={"error": f"It failed, {count}."})

    tab.show("Compare")
    page.route("**/gradio_api/queue/join*", failed)
    for number_ in (1, 2, 3):
        page.click("#compare-start")
        page.get_by_text(f"It failed, {number_}.").wait_for(state="visible")
    seen = [t.inner_text() for t in page.get_by_test_id("toast-text").all() if t.is_visible()]
    assert seen == ["It failed, 3."]
    tab.complaints.clear()  # the console names the answers of this test


def test_refusals_are_beside_their_button(app: Any, visit: Any) -> None:
    """One at a time, and gone when it works; no message covers the page."""
    tab = visit(app)
    page = tab.page
    tab.show("Compare")
    page.wait_for_selector("#compare-call")
    open_all(tab)
    for line, said in (("colour = 1", "takes no colour"), ("nonsense", "are lines NAME = VALUE")):
        page.fill("#compare-more textarea", line)
        page.click("#compare-start")
        page.wait_for_function(
            "said => document.querySelector('#compare-refused').innerText.includes(said)", arg=said
        )
        assert page.locator("#compare-refused [role=alert]").count() == 1
    assert page.get_by_test_id("toast-body").count() == 0
    page.fill("#compare-more textarea", "")
    page.click("#compare-start")
    page.wait_for_selector("#compare-status [data-state=running]")
    page.wait_for_selector("#compare-refused", state="hidden")
    page.click("#compare-stop")
    page.wait_for_selector("#compare-status [data-state=stopped]")


@pytest.mark.parametrize("width", [1280, 1400, 1920])
def test_the_page_is_as_wide_in_every_tab(app: Any, visit: Any, width: int) -> None:
    tab = visit(app, width=width)
    seen = set()
    for name in (*TABS, "Generate"):
        tab.show(name)
        box = tab.page.locator(".tenuto-head").bounding_box()
        seen.add((box["x"], box["width"]))
    assert len(seen) == 1, seen


def test_progress_is_seen_on_a_phone(app: Any, visit: Any) -> None:
    """Where Generate was pressed, and on nothing else's words."""
    tab = visit(app, width=390, height=700)
    page = tab.page
    number(page, "#steps", "900")  # or it would be over before Stop is pressed
    page.locator("#generate").scroll_into_view_if_needed()
    page.click("#generate")
    place = page.locator("#generate-working")
    place.wait_for(state="visible")
    page.wait_for_function(
        "document.querySelector('#generate-working').innerText.trim().length > 3"
    )
    box = place.bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 700, "it is on the screen"
    page.wait_for_selector("#numbers [role=progressbar]")
    assert "No image yet" not in tab.text("#numbers")
    bar, words = (place.locator(part).bounding_box() for part in (".tenuto-bar", ".tenuto-small"))
    assert bar["y"] + bar["height"] <= words["y"], "nothing is printed over the bar"
    page.click("#generate-stop")
    page.wait_for_selector("#numbers [data-state=stopped]", state="attached")
    place.wait_for(state="hidden")


def test_an_empty_seed_is_any_and_no_step_is_an_error(app: Any, visit: Any) -> None:
    tab = visit(app)
    page = tab.page
    page.fill("#prompt textarea", "an empty seed")
    page.click("#beside input")
    for value, said in (("0", "from 1 to 1000, not 0"), ("-3", "not -3"), ("2.5", "not 2.5")):
        number(page, "#steps", value)
        page.click("#generate")
        page.wait_for_function(
            "said => document.querySelector('#numbers').innerText.includes(said)", arg=said
        )
        assert "It cannot be generated." in tab.text("#numbers")
    assert not list((app.out / "pictures").glob("an-empty-seed*"))
    number(page, "#steps", "1")
    number(page, "#seed", "")
    for count in (1, 2):
        page.wait_for_function("!document.querySelector('#generate').disabled")
        page.click("#generate")
        end = time.monotonic() + PATIENCE
        while len(list((app.out / "pictures").glob("an-empty-seed*.png"))) < count:
            assert time.monotonic() < end, tab.text("#numbers")
            time.sleep(0.1)
    names = {p.stem.split("-")[3] for p in (app.out / "pictures").glob("an-empty-seed*.png")}
    assert len(names) == 2 and all(name.isdigit() for name in names)


def test_check_boxes_and_radios_show_the_focus(app: Any, visit: Any) -> None:
    tab = visit(app)
    page = tab.page
    ring = "(() => { const s = getComputedStyle(document.activeElement);" \
           " return [document.activeElement.type, s.outlineStyle, s.outlineWidth] })()"  # fmt: skip
    seen = set()
    for name in TABS:
        tab.show(name)
        page.locator("h1").click()
        for _ in range(40):
            page.keyboard.press("Tab")
            kind, style, width = page.evaluate(ring)
            if kind in ("checkbox", "radio"):
                seen.add(kind)
                assert style == "solid" and float(width.removesuffix("px")) >= 2, name
    assert seen == {"checkbox", "radio"}


def test_the_command_says_something_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    """Before Gradio is loaded, which takes seconds."""
    command = [
        sys.executable,
        "-m",
        "tenuto.cli",
        "app",
        "--no-browser",
        "--out",
        str(tmp_path / "o"),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, env=os.environ | environment, text=True
    )
    assert process.stderr is not None
    try:
        assert process.stderr.readline().startswith("tenuto: starting")
        first = time.monotonic()
        assert process.stderr.readline().startswith("tenuto: the app is at")
        assert time.monotonic() - first > 0.5, "the first line came with the second"
    finally:
        process.terminate()
        process.communicate()
