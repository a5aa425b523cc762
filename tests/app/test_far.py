"""How far an image is, as the page says it: in words, with the time that is left."""

from __future__ import annotations

import threading
import time

import pytest

from gradio_app.far import Far, meanwhile, starting
from tenuto.errors import Cancelled
from tests.patience import PATIENCE


def test_what_is_said_from_loading_to_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 of 40 calls in 20 s: 60 s are left, and two more images take 80 s each."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    far = Far(2, 4)
    assert "Image 2 of 4: loading the model" in far.card() and "left" not in far.bar()
    far.on_call(0, 40)
    assert far.left is None and "Image 2 of 4" in far.bar() and "loading" not in far.bar()
    now = 120.0
    far.on_call(10, 40)
    for shown in (far.card(), far.bar()):
        assert 'role="progressbar"' in shown and 'aria-valuenow="25"' in shown
        assert "25% · " in shown and "10 of 40 calls · 20 s so far" in shown
        assert "about 1 min 0 s left of this image, 3 min 40 s in all" in shown
    alone = Far(total=40, began=100.0, done=10)
    assert "about 1 min 0 s left</div>" in alone.card() and "Generating" in alone.card()


def test_in_line_its_place_is_said_until_it_begins() -> None:
    far = Far()
    far.on_wait(2)
    assert "In line, place 2." in far.card() and "In line, place 2." in far.bar()
    assert 'data-state="waiting"' in far.card() and "begins by itself" in far.bar()
    far.on_call(0, 4)
    assert "In line" not in far.card() + far.bar() and 'data-state="running"' in far.card()
    assert "In line behind another image" in starting(True) and "Starting" in starting(False)


def test_the_page_is_told_while_it_works() -> None:
    """At once, then again and again; the answer, or what was raised, comes out in the end."""
    go, seen = threading.Event(), list[str]()

    def work() -> int:
        assert go.wait(PATIENCE)
        return 5

    def look() -> str:
        seen.append("look")
        if len(seen) == 3:
            go.set()
        return "half"

    looks = meanwhile(work, look, 0.01)
    said = list[str]()
    while True:
        try:
            said.append(next(looks))
        except StopIteration as end:
            assert end.value == 5
            break
    assert len(said) >= 3 and set(said) == {"half"}

    def stops() -> int:
        raise Cancelled

    with pytest.raises(Cancelled):
        list(meanwhile(stops, look, 0.01))
