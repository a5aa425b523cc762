"""Does the app's memory grow? Resident memory of `tenuto app` over generations and API calls.

    python benchmarks/app_memory.py [--count 300] [--warm 40]

Each round is one generation and one other call, half of them by a client of its own: a page that is
opened and closed again.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "demo:transformer"


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """The app's address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tenuto.cli", "app", "--no-browser", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "core"), "TMPDIR": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--out", str(folder / "out")], cwd=folder, env=environment,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(url).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def resident(process: int) -> float:
    """MiB that a process holds (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def settled(process: int) -> float:
    """The least of a few readings: what one call holds for a moment does not count."""
    found = []
    for _ in range(5):
        time.sleep(0.1)
        found.append(resident(process))
    return min(found)


def work(
    url: str,
    client: Any,
    number: int,
    model: str = MODEL,
    artifact: str = "shipped:demo-transformer.w8a8",
    pages: int = 2,
) -> None:
    """One generation and one other call; every so many by a page of its own, which is read too."""
    from gradio_client import Client

    if number % pages == 1:
        client = Client(url, verbose=False)
        with urllib.request.urlopen(url) as page:
            page.read()
    client.predict(
        model=model, prompt=f"a goldfish, number {number}", seed=number, steps=1, guidance=None,
        artifact=artifact if number % 4 == 0 else "", beside=False, api_name="/generate",
    )  # fmt: skip
    calls = (("/about", ()), ("/job", ("compare",)), ("/stop", ("compare",)))
    name, given = calls[number % len(calls)]
    client.predict(*given, api_name=name)


def main() -> None:
    """Print the resident memory after the warm-up, in between and in the end."""
    from gradio_client import Client

    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--warm", type=int, default=40)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (url, process):
        client = Client(url, verbose=False)
        for number in range(asked.warm):
            work(url, client, number)
        first = settled(process)
        print(f"after {asked.warm} rounds: {first:.1f} MiB", flush=True)
        for number in range(1, asked.count + 1):
            work(url, client, asked.warm + number)
            if number % max(1, asked.count // 6) == 0:
                now = settled(process)
                print(f"{number} more: {now:.1f} MiB ({now - first:+.1f})", flush=True)


if __name__ == "__main__":
    main()
