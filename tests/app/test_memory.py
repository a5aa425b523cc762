"""The server's memory after many images and calls: what it was after the first ones."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.app_memory import resident, work

pytestmark = pytest.mark.slow

WARM, COUNT, MOST = 30, 60, 20.0  # rounds, rounds, MiB
FEW = """
from tenuto.cli.app import module
module("app").SESSIONS = 4  # as many pages are remembered after a short while
"""


def test_memory_stays_flat(start: Any, record_property: Any) -> None:
    """Each round is an image and another call, half of them by a page of its own."""
    from gradio_client import Client

    with start(before=FEW) as app:
        client = Client(app.url, verbose=False)
        for number in range(WARM):
            work(app.url, client, number)
        first = resident(app.process.pid)
        for number in range(COUNT):
            work(app.url, client, WARM + number)
        grown = resident(app.process.pid) - first
    record_property("grown", f"{grown:+.1f} MiB over {COUNT} rounds, from {first:.0f} MiB")
    assert grown < MOST
