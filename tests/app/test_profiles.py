"""Profiles of the tab Calibrate: each sets its fields, and fields that are changed have another."""

from __future__ import annotations

from typing import Any

import pytest

from gradio_app.calibrate_fields import ENCODERS, SCHEMES
from gradio_app.profiles import FIRST, OWN, PROFILES
from tenuto.calibration import PRESETS

FIELDS = """() => [
  document.querySelector('#calibrate-scheme input').value.split(':')[0].toLowerCase(),
  ...['preset', 'encoder', 'profile'].map(
    name => document.querySelector(`#calibrate-${name} input:checked`).value),
  document.querySelector('#calibrate-reuse input[type=number]').value,
].join('|')"""


def test_profiles_are_choices_that_there_are() -> None:
    for profile in PROFILES.values():
        assert profile.scheme in dict(SCHEMES).values() and profile.preset in PRESETS
        assert profile.text_encoder in dict(ENCODERS).values() and profile.reuse % 5 == 0
    assert len({tuple(profile.chosen) for profile in PROFILES.values()}) == len(PROFILES)


@pytest.mark.slow
def test_a_profile_sets_its_fields(app: Any, visit: Any) -> None:
    """By mouse and by keyboard; the file that the check expects is another one then."""
    page = (tab := visit(app, width=1400)).page
    tab.show("Calibrate")

    def shows(name: str, reuse: int | None = None) -> None:
        known = PROFILES.get(name, PROFILES["best"])
        wanted = [known.scheme, known.preset, known.text_encoder, name]
        said = "|".join([*wanted, str(known.reuse if reuse is None else reuse)])
        page.wait_for_function(f"said => ({FIELDS})() === said", arg=said)

    shows(FIRST)
    page.wait_for_selector("#calibrate-checked [data-state=done]")
    assert "A file of about 21 MiB: the model has 43 MiB in 16 bits." in tab.text(
        "#calibrate-checked"
    )
    page.locator("#calibrate-profile").get_by_text("Small").click()
    shows("small")
    page.wait_for_function(
        "document.querySelector('#calibrate-checked').innerText.includes('about 12 MiB')"
    )
    page.focus("#calibrate-profile input:checked")
    for name in ("balanced", "best"):
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        shows(name)
    page.fill("#calibrate-reuse input[type=number]", "5")
    page.keyboard.press("Tab")
    shows(OWN, 5)
    page.fill("#calibrate-reuse input[type=number]", "0")
    page.keyboard.press("Tab")
    shows("best")
