"""What is asked for while something else is at work stands in line, without a server and with."""

from __future__ import annotations

import threading
import time
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from gradio_app import jobs, line, view
from gradio_app.bench import Bench
from gradio_app.desk import LONGEST, Desk
from gradio_app.jobs import Job
from gradio_app.settings import Settings
from tenuto.errors import Cancelled, TenutoError
from tests.patience import PATIENCE

ENDS = "import sys; sys.stdin.read()"  # until its input ends, which stops it
GOES = """
import json, pathlib, sys, time
asked = json.loads(sys.stdin.readline())
while not pathlib.Path(asked["go"]).exists(): time.sleep(0.01)
print(json.dumps({"result": {"name": "x"}}), flush=True)
"""


def job(kind: str, folder: Path, name: str) -> Job:
    """One that is done when there is a file `name`."""
    return Job(kind, {"out": name, "go": str(folder / name)}, folder / f"{name}.log")


def go(folder: Path, name: str) -> None:
    (folder / name).write_text("")


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(jobs, "WORKER", GOES)
    found = Desk()
    yield found
    found.close()


def test_each_begins_when_the_one_before_is_over(desk: Desk, tmp_path: Path) -> None:
    """Of whatever kind; one is taken out of the line, and its page says so."""
    over: list[str] = []
    kinds = {"a": "calibrate", "b": "compare", "c": "export", "d": "calibrate"}
    a, b, c, d = (
        desk.start(job(kind, tmp_path, name), lambda job: over.append(job.request["out"]))
        for name, kind in kinds.items()
    )
    assert [one.state for one in (a, b, c, d)] == ["running", *["waiting"] * 3]
    assert [one.place for one in (a, b, c, d)] == [0, 1, 2, 3] and desk.busy == "calibrate"
    assert desk.job(d.id, "calibrate") is a, "what runs is shown"
    assert desk.job(None, "compare") is b and "In line, place 1." in view.status(b, "")
    desk.remove(c.id)
    assert (c.state, c.begun, d.place) == ("stopped", False, 2) and c.over.is_set()
    assert "taken out of the line" in view.status(c, "") and over == ["c"]
    desk.remove(a.id)  # it has begun: a Stop stops it
    assert a.state == "running"
    go(tmp_path, "a")
    assert a.over.wait(PATIENCE) and a.state == "done"
    assert (b.state, d.place) == ("running", 1)
    go(tmp_path, "d")
    b.stop()
    assert b.over.wait(PATIENCE) and b.state == "stopped"
    assert d.over.wait(PATIENCE) and d.state == "done" and over == ["c", "a", "b", "d"]
    assert desk.busy == "" and not desk.requests


def test_an_image_stands_in_line_too(desk: Desk, tmp_path: Path) -> None:
    """And jobs behind it; one that is stopped or removed while it waits is not made."""
    places, ended = list[int](), dict[str, str]()
    stop = threading.Event()

    def image(name: str) -> None:
        try:
            with desk.turn(name, places.append, stop.is_set if name == "two" else lambda: False):
                ended[name] = "made"
        except Cancelled:
            ended[name] = "cancelled"

    first = desk.start(job("compare", tmp_path, "first"))
    threads = [threading.Thread(target=image, args=(name,)) for name in ("one", "two", "three")]
    for count, thread in enumerate(threads, start=1):
        thread.start()
        while len(desk.line) < count:
            time.sleep(0.01)
    last = desk.start(job("export", tmp_path, "last"))
    assert desk.image == "waiting" and last.place == 4
    stop.set()
    desk.remove(desk.line[2].id)
    threads[1].join(PATIENCE)
    threads[2].join(PATIENCE)
    assert ended == {"two": "cancelled", "three": "cancelled"} and last.place == 2
    go(tmp_path, "first")
    threads[0].join(PATIENCE)
    assert ended["one"] == "made" and 1 in places and first.over.wait(PATIENCE)
    go(tmp_path, "last")
    assert last.over.wait(PATIENCE) and last.state == "done"


def test_what_cannot_begin_lets_the_next_begin(desk: Desk, tmp_path: Path) -> None:
    first = desk.start(job("compare", tmp_path, "first"))
    broken = desk.start(Job("export", {"out": "x"}, tmp_path / "first.log" / "no folder" / "log"))
    last = desk.start(job("compare", tmp_path, "last"))
    go(tmp_path, "first")
    go(tmp_path, "last")
    assert first.over.wait(PATIENCE) and last.over.wait(PATIENCE) and last.state == "done"
    assert broken.state == "failed" and broken.error.startswith("It cannot begin: ")
    with pytest.raises(OSError, match="no folder"):
        desk.start(Job("export", {"out": "x"}, tmp_path / "first.log" / "no folder" / "log"))
    assert desk.busy == ""


def test_the_line_has_an_end(desk: Desk, tmp_path: Path) -> None:
    for number in range(LONGEST + 1):
        desk.start(job("compare", tmp_path, f"{number}"))
    with pytest.raises(TenutoError, match="20 jobs stand in line"):
        desk.start(job("compare", tmp_path, "more"))
    desk.close()
    assert not desk.line and desk.busy == ""


def test_what_is_shown_of_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anew only when it changed; a calibration that never began leaves nothing behind."""
    monkeypatch.setattr(jobs, "WORKER", ENDS)
    bench = Bench(Settings(tmp_path, device="cpu"))
    wanted = {"model": "demo:unet", "scheme": "w4a8", "preset": "quick", "reuse": None}
    first = bench.calibrate(name="first", **wanted)
    assert line.updates(bench, [])[0] == {"__type__": "update"}
    second = bench.calibrate(name="second", **wanted)
    third = bench.compare("demo:unet", ["shipped:demo-unet.w8a8"], 2)
    with pytest.raises(TenutoError, match="is being made, or stands in line"):
        bench.calibrate(name="second", **wanted)
    with pytest.raises(TenutoError, match="is being made, or stands in line"):
        bench.discard("second")
    group, said, which, now = line.updates(bench, [])
    assert group.visible is True and now == [second.id, third.id] == [v for _, v in which.choices]
    text = unescape(said)
    assert "2 in line." in text and "1. Calibration: demo:unet, w4a8, quick, to second." in text
    assert line.updates(bench, now)[3] == {"__type__": "update"}, "nothing changed"
    assert "second" in bench.places.unfinished()
    bench.stop(second.id, "calibrate")  # what runs is stopped first, whatever id a page has
    assert first.over.wait(PATIENCE) and first.state == "stopped" and second.state == "running"
    bench.desk.remove(third.id)
    bench.stop(None, "calibrate")
    assert second.over.wait(PATIENCE) and line.updates(bench, now)[0].visible is False
    assert bench.facts(third.id, "compare")["state"] == "stopped"
    fourth = bench.compare("demo:unet", ["shipped:demo-unet.w8a8"], 2)
    fifth = bench.calibrate(name="fifth", **wanted)
    bench.stop(None, "calibrate")
    assert fifth.state == "stopped" and "fifth" not in bench.places.unfinished()
    assert fourth.state == "running"
    bench.desk.close()
    assert fourth.state == "stopped"


@pytest.mark.slow
def test_a_line_on_the_page(app: Any, visit: Any, findings: Any) -> None:
    """A second Start, an image and an export wait; a reload shows them; one is removed."""
    tab = visit(app)
    page = tab.page
    tab.show("Calibrate")
    for name in ("line-one", "line-two"):
        page.fill("#calibrate-name textarea, #calibrate-name input", name)
        page.click("#calibrate-start")
        if name == "line-one":
            page.wait_for_selector("#calibrate-status [data-state=running]")
    page.wait_for_selector("#calibrate-refused [data-state=waiting]")
    assert "place 1" in tab.text("#calibrate-refused")
    tab.show("Generate")
    page.fill("#steps input[type=number]", "1")
    page.click("#generate")
    page.wait_for_function("document.querySelector('#line-said')?.innerText.includes('Image: ')")
    page.wait_for_function(
        "document.querySelector('#generate-working')?.textContent.includes('In line, place 2')"
    )
    assert not findings(page), "a line"
    page.click("#generate-stop")
    page.wait_for_selector("#numbers [data-state=stopped]")
    page.wait_for_function("!document.querySelector('#line-said')?.innerText.includes('Image: ')")

    page.reload()
    page.wait_for_selector(".gradio-container[data-tenuto=ready]")
    page.wait_for_function("document.querySelector('#line-said')?.innerText.includes('line-two')")
    tab.show("Compare")
    page.fill("#compare-count input[type=number]", "1")
    page.click("#compare-start")
    page.wait_for_selector("#compare-status [data-state=waiting]")
    page.wait_for_function("document.querySelector('#line-said')?.innerText.includes('2 in line')")
    page.click("#line-remove")  # the last one is chosen
    page.wait_for_selector("#compare-status [data-state=stopped]")
    tab.show("Calibrate")
    page.click("#calibrate-stop")
    page.wait_for_function(
        "document.querySelector('#calibrate-status')?.innerText.includes('line-two')"
    )
    page.wait_for_selector("#line", state="hidden")
    page.click("#calibrate-stop")
    page.wait_for_selector("#calibrate-status [data-state=stopped]")
