"""Several parts of a job on one scale, and the bars that long functions show by themselves."""

from __future__ import annotations

import inspect
import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import tenuto as tn
from tenuto.progress import Bars, parts, shown


def test_parts_follow_each_other_on_one_scale() -> None:
    seen: list[tuple[int, int, str]] = []
    notes = parts(lambda *note: seen.append(note), {"record": 100, "quantize": 50, "end": 0})
    notes["record"](0, 7, "run")
    notes["record"](7, 7, "run")
    notes["quantize"](0, 3, "")
    notes["quantize"](2, 3, "block 2")
    notes["quantize"](3, 3, "")
    notes["end"](0, 0, "nothing to do")
    assert seen == [
        (0, 150, "run"), (100, 150, "run"), (100, 150, ""), (133, 150, "block 2"), (150, 150, ""),
        (150, 150, "nothing to do"),
    ]  # fmt: skip


def test_parts_nest_and_say_their_names() -> None:
    seen: list[tuple[int, int, str]] = []
    whole = parts(lambda *note: seen.append(note), {"a": 10, "b": 10}, named=True)
    inner = parts(whole["b"], {"x": 1, "y": 1}, named=True)
    inner["y"](0, 1, "half")
    whole["a"](1, 1, "")
    assert seen == [(15, 20, "b y half"), (10, 20, "a")]


def test_nobody_need_listen() -> None:
    parts(None, {"a": 1})["a"](1, 1, "")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def work(on_progress: Any, **options: Any) -> None:
    with shown(on_progress, "Working", **options) as told:
        for done in range(3):
            if told is not None:
                told(done, 2, f"part {done}")


def test_a_bar_is_shown_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, given, options, seen in (
        (Terminal(), True, {}, True), (io.StringIO(), True, {}, False),
        (Terminal(), None, {}, False), (Terminal(), False, {}, False),
        (Terminal(), True, {"able": False}, False), (Terminal(), lambda *_: None, {}, False),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "stderr", stream)
        work(given, **options)
        assert bool(stream.getvalue()) == seen
        assert not seen or stream.getvalue().endswith("\n")
    monkeypatch.setattr(sys, "stderr", None)  # a program without a console
    work(True)


def test_a_notebook_gets_a_bar_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (True, False):
        config = {"IPKernelApp": {}} if kernel else {}
        shell = SimpleNamespace(config=config)
        ipython = SimpleNamespace(get_ipython=lambda found=shell: found)
        monkeypatch.setitem(sys.modules, "IPython", ipython)  # type: ignore[arg-type]
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        work(True)
        assert ("Working" in stream.getvalue()) == kernel


def test_what_is_given_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(lambda *said: seen.append(said))
    assert seen == [(0, 2, "part 0"), (1, 2, "part 1"), (2, 2, "part 2")]


def test_an_error_ends_the_line_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(tn.Cancelled), shown(True, "Working") as told:
        assert told is not None
        told(1, 4, "")
        raise tn.Cancelled
    assert stream.getvalue().endswith("\n") and "100%" not in stream.getvalue()


def test_all_is_done_when_the_work_is_over() -> None:
    """Not when the last part begins: what follows it takes its time, too."""
    stream = Terminal()
    with Bars(stream) as bars:
        bars.stages = ["Recording", "Quantizing"]
        bars("Quantizing")(0, 4, "")
        bars._bar.mininterval = 0
        progress = bars("Quantizing")
        for done in range(5):
            progress(done, 4, "")
        bars._bar.refresh()
        last = stream.getvalue().split("\r")[-1]
        assert last.startswith("2/2 Quantizing:  99%") and "<soon" in last
        assert "100%" not in stream.getvalue()
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("2/2 Quantizing: 100%") and "<soon" not in last


def test_every_long_function_shows_a_bar_unless_told_otherwise() -> None:
    functions = {name: getattr(tn, name) for name in tn.__all__}
    takes = {
        name: inspect.signature(function).parameters["on_progress"].default
        for name, function in functions.items()
        if inspect.isfunction(function) and "on_progress" in inspect.signature(function).parameters
    }
    assert takes == dict.fromkeys(
        ["compare", "export", "quantize", "quantize_encoder", "quantize_text_encoder", "record",
         "train_router"], True,
    )  # fmt: skip
    assert all("on_progress" in (functions[name].__doc__ or "") for name in takes)
