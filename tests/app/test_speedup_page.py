"""In Chromium: the speedup as a knob with what it would do beside it; the check before Start."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tenuto.artifact import Artifact
from tenuto.resources import asset
from tests.app.conftest import choose, restore
from tests.app.kernels import kernel, without_forecast

pytestmark = pytest.mark.slow

SAID = "#generate-speedup-said"
WITHOUT = "without"  # an artifact as of before there were forecasts


@pytest.fixture(scope="module")
def forecast(app: Any) -> str:
    """The name of an artifact of the first model that has a forecast of its own."""
    made = Artifact.load(asset("artifacts/demo-transformer.w8a8.safetensors"))
    made.add_forecast(kernel())
    made.save(app.out / "forecast.safetensors")
    old = without_forecast(asset("artifacts/demo-transformer.w8a8.safetensors"))
    old.save(app.out / f"{WITHOUT}.safetensors")
    return "forecast"


@contextmanager
def answered(page: Any) -> Iterator[None]:
    """Until the artifact's own settings have come, which would take the place of what is typed."""
    waiting: set[Any] = set()

    def asked(request: Any) -> None:
        waiting.add(request)

    def came(request: Any) -> None:
        waiting.discard(request)

    listeners = {"request": asked, "requestfinished": came, "requestfailed": came}
    for name, listener in listeners.items():
        page.on(name, listener)
    yield
    page.wait_for_timeout(300)
    for _ in range(1200):
        if not waiting:
            break
        page.wait_for_timeout(100)
    assert not waiting, [request.url for request in waiting]
    for name, listener in listeners.items():
        page.remove_listener(name, listener)
    page.wait_for_timeout(300)


def speedup(page: Any, value: str, name: str = "generate") -> None:
    page.fill(f"#{name}-speedup input[type=number]", value)
    page.keyboard.press("Tab")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_speedup_is_told_used_and_restored(
    app: Any, visit: Any, forecast: str, findings: Any, dark: bool
) -> None:
    tab = visit(app, dark=dark, width=390 if dark else 1280)
    page = tab.page
    tab.show("Compare")  # the lists are read anew where a tab is chosen
    tab.show("Generate")
    with answered(page):
        choose(page, "#artifact", WITHOUT)
    page.wait_for_selector(f"{SAID} figure svg")
    page.click("#generate-speedup-auto")  # of the one that ships
    page.wait_for_selector(f"{SAID} circle.here")
    assert "not measured on your model" in tab.text(SAID)
    assert 1.5 < float(page.input_value("#generate-speedup input[type=number]")) < 3
    speedup(page, "1")
    with answered(page):
        choose(page, "#artifact", forecast)
    page.wait_for_function(
        "place => document.querySelector(place).innerText.startsWith('Off: each of the 20')",
        arg=SAID,
    )
    speedup(page, "2")
    page.wait_for_selector(f"{SAID} [data-calls='10'][data-steps='20']")
    page.wait_for_selector(f"{SAID} circle.here")
    assert re.search(r"10 of 20 calls computed.*about \d+ dB", tab.text(SAID))
    assert "not measured" not in tab.text(SAID)
    page.focus("#generate-speedup input[type=range]")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f"{SAID} [data-calls='9']")  # 2.1: of 20 steps
    page.fill("#steps input", "10")
    page.keyboard.press("Tab")
    page.wait_for_selector(f"{SAID} [data-calls='4'][data-steps='10']")
    assert not findings(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= (390 if dark else 1280)

    before = {*(app.out / "pictures").glob("*.png")} if (app.out / "pictures").is_dir() else set()
    page.click("#beside input")
    page.click("#generate")
    page.wait_for_selector("#generate-image img")
    page.wait_for_selector("#numbers table")
    assert "denoiser calls skipped 60.0%" in tab.text("#numbers")
    (file,) = {*(app.out / "pictures").glob("*.png")} - before
    page.reload()
    page.wait_for_selector("#generate")
    restore(page, file)
    page.wait_for_selector(f"{SAID} [data-calls='4'][data-steps='10']")
    assert page.input_value("#generate-speedup input[type=number]") == "2.1"
    assert page.input_value("#artifact input") == forecast


def test_a_comparison_at_a_speedup(app: Any, visit: Any, forecast: str) -> None:
    """What is told of several is told of each; with one artifact, the words are of that."""
    tab = visit(app)
    page = tab.page
    tab.show("Compare")
    said = "#compare-speedup-said"
    page.wait_for_selector("#compare-call")
    for name in (WITHOUT, forecast):
        page.locator("#compare-artifacts input").fill(name)
        with answered(page):
            page.keyboard.press("Enter")
        page.keyboard.press("Escape")
    page.wait_for_selector(f"{said} figure")
    speedup(page, "2", "compare")
    page.wait_for_function(  # of the other one
        "place => document.querySelector(place).innerText.includes('not measured')", arg=said
    )
    for _ in range(2):  # the one that is chosen at first, and the one without
        with answered(page):
            page.locator("#compare-artifacts .token-remove").first.click()
    page.wait_for_function(
        "place => !document.querySelector(place).innerText.includes('not measured')", arg=said
    )
    page.fill("#compare-count input", "1")
    page.get_by_text("All options").locator("visible=true").click()
    page.fill("#compare-steps input, #compare-steps textarea", "10")
    page.keyboard.press("Tab")
    speedup(page, "2", "compare")  # another choice of artifacts brings their own
    page.wait_for_selector(f"{said} [data-calls='5'][data-steps='10']")
    page.click("#compare-start")
    page.wait_for_function(  # not the last comparison, which the page shows until this one begins
        "['Comparison done', 'speedup 2'].every("
        "  part => document.querySelector('#compare-status').innerText.includes(part))"
    )
    page.wait_for_function(
        "document.querySelector('#compare-numbers').innerText.includes('calls skipped')"
    )
    assert "denoiser calls skipped – 50.0%" in tab.text("#compare-numbers")


def test_the_check_is_read_before_start(app: Any, visit: Any, findings: Any) -> None:
    """By itself, anew when something changes, and Start keeps to it."""
    tab = visit(app)
    page = tab.page
    tab.show("Calibrate")
    page.wait_for_selector("#calibrate-checked [data-state=done]")
    first = tab.text("#calibrate-checked")
    assert "It can be calibrated." in first and "97 in w8a8" in first and "GiB free" in first
    assert not findings(page)
    choose(page, "#calibrate-scheme", "W4A8: ")
    page.wait_for_function(
        "document.querySelector('#calibrate-checked').innerText.includes('93 in w4a8')"
    )
    page.get_by_text("All options").locator("visible=true").click()
    page.fill("#calibrate-steps input, #calibrate-steps textarea", "1")
    page.keyboard.press("Tab")
    page.wait_for_selector("#calibrate-checked [data-state=failed]")
    page.fill("#calibrate-name input, #calibrate-name textarea", "checked")
    sentence = "With one step there is nothing to reuse."
    assert sentence in tab.text("#calibrate-checked")
    assert not findings(page)
    page.click("#calibrate-start")
    page.wait_for_selector("#calibrate-refused [role=alert]")
    assert sentence in tab.text("#calibrate-refused")
    assert tab.page.locator("#calibrate-status [data-state=running]").count() == 0

    page.fill("#calibrate-steps input, #calibrate-steps textarea", "")
    page.click("#calibrate-check")
    page.wait_for_selector("#calibrate-checked [data-state=done]")
    page.click("#calibrate-start")
    page.wait_for_selector("#calibrate-status [data-state=running]")
    page.wait_for_selector("#calibrate-checked", state="hidden")
    page.click("#calibrate-stop")
    page.wait_for_selector("#calibrate-status [data-state=stopped]")
    page.wait_for_selector("#calibrate-checked", state="visible")
    request = json.loads(Path(app.out / "unfinished" / "checked.json").read_text())
    assert request["scheme"] == "w4a8" and request["steps"] is None
