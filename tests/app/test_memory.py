"""The server's memory after many images and calls: what it was after the first ones."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.app_memory import settled, work

pytestmark = pytest.mark.slow

WARM, COUNT, MOST = 40, 120, 9.6  # rounds, rounds, MiB: 80 kB a round
TINY = "mine/tiny"  # images of 32 x 32
FEW = """
from tenuto.cli.app import module
module("app").SESSIONS = 4  # as many pages are remembered after a short while
"""


def test_memory_stays_flat(start: Any, models: Any, record_property: Any) -> None:
    """160 images and 160 other calls, every tenth by a page of its own: flat after the first 40."""
    from gradio_client import Client

    with start(roots=models, before=FEW) as app:
        client = Client(app.url, verbose=False)
        for number in range(WARM):
            work(app.url, client, number, TINY, "", pages=10)
        first = settled(app.process.pid)
        for number in range(COUNT):
            work(app.url, client, WARM + number, TINY, "", pages=10)
        grown = settled(app.process.pid) - first
    record_property("grown", f"{grown:+.1f} MiB over {COUNT} rounds, from {first:.0f} MiB")
    assert grown < MOST
