"""How long a whole calibration may still take, and what the machine has left."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from gradio_app.jobs import RUNNING, Job
from gradio_app.machine import line
from gradio_app.requests import calibration, expected
from gradio_app.time_left import in_all, use_of
from gradio_app.view import bar
from tests.app.test_checking import bench  # noqa: F401

TIMES = [(2, 10.0), (1, None), (2, 100.0)]  # recorded and quantized, text encoders, a router


def test_parts_belong_to_uses() -> None:
    assert [use_of(TIMES, part) for part in range(7)] == [-1, 0, 0, 1, 2, 2, -1]


@pytest.mark.parametrize(
    ("times", "part", "left", "gone", "wanted"),
    [
        ([(2, 10.0), (2, 100.0)], 1, 2.0, 1.0, 9 + 100),  # the rest of what was expected
        ([(2, 10.0), (2, 100.0)], 1, 20.0, 1.0, 20 + 100),  # or more, by its own pace
        ([(2, 10.0), (2, 100.0)], 2, 10.0, 10.0, 10 + 200),  # twice as slow as expected
        ([(2, 10.0), (2, 100.0)], 4, 30.0, 90.0, 30),
        ([(2, 10.0), (2, 100.0)], 2, None, 10.0, None),
        (TIMES, 2, 1.0, 1.0, None),  # of text encoders nothing is known
        (TIMES, 3, 1.0, 1.0, 1 + 100),
        ([], 1, 1.0, 1.0, None),
    ],
)
def test_what_is_left_in_all(
    times: Any, part: int, left: float | None, gone: float, wanted: float | None
) -> None:
    assert in_all(times, part, left, gone) == pytest.approx(wanted)


def test_a_job_says_both() -> None:
    job = Job("calibrate", {}, Path("log"), [(2, 10.0), (2, 100.0)])
    job.state = RUNNING
    job.take({"stage": "Recording", "part": 1, "parts": 4, "done": 0, "total": 100})
    job.use_began = job.stage_began = time.monotonic() - 2
    job.take({"stage": "Recording", "part": 1, "parts": 4, "done": 50, "total": 100})
    assert "about 2.0 s left in this part, 1 min 48 s in all" in bar(job)
    job.take({"stage": "Recording", "part": 1, "parts": 4, "done": 100, "total": 100})
    assert "0.0 s so far · about 1 min 48 s left in all</div>" in bar(job)
    job.take({"stage": "Quantizing", "part": 2, "parts": 4, "done": 0, "total": 100})
    assert time.monotonic() - job.use_began > 1.9, "of the same use"
    job.take({"stage": "Recording", "part": 3, "parts": 4, "done": 0, "total": 100})
    assert time.monotonic() - job.use_began < 1.9


def test_the_check_says_what_to_expect(bench: Any) -> None:  # noqa: F811
    chosen = {"scheme": "w4a8", "preset": "quick", "text_encoder": "w8"} | dict.fromkeys(
        ("method", "rounding")
    )
    how = {"reuse": 0.3, "steps": 20} | dict.fromkeys(
        ("guidance", "seed", "iterations", "prompts_text")
    )
    request = calibration(bench.places, "tiny", chosen, how, None)
    (first, seconds), encoders, (last, more) = expected(bench.places, request, "cpu")
    assert (first, encoders, last) == (2, (1, None), 2)
    assert seconds and more and more > seconds > 0


def test_what_the_machine_has_left() -> None:
    said = line("cpu")
    assert "CPU, " in said and "GiB of memory free" in said
