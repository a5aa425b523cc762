"""Commands killed at random moments go on and end in the same bytes, whatever was half done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tenuto.lock import Lock
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[3]
KILLS = 12

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "fork"), reason="Windows has no fork, by which a run starts at once"
    ),
]

# Imports once, then runs each command line that it reads in a process of its own. A line says after
# how many seconds that is killed, 0: not at all; answered with the exit status and the seconds.
# The processes must not share the lock of tqdm's bars: one that is killed with it stops the others.
SERVER = f"""
    import faulthandler, os, signal, sys, threading, time, traceback
    import torch
    from tqdm import tqdm
    tqdm.monitor_interval = 0  # no thread that could have a lock while a process forks
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    import tenuto.cli.checks
    from tenuto import cli
    from tenuto.calibration import quantize, quantize_encoder, train_router
    from tenuto.sampling.loading import load
    load(sys.argv[1], torch.device("cpu"), torch.float32)
    tenuto.cli.checks.prompts = lambda name: ["a red dog", "a blue cat"]
    print("ready", flush=True)
    for line in sys.stdin:
        after, *arguments = line.rstrip().split("\\t")
        start, child = time.monotonic(), os.fork()
        if child == 0:
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            faulthandler.dump_traceback_later({0.9 * PATIENCE}, file=2)
            code = 70
            try:
                code = cli.main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if float(after):
            time.sleep(float(after))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, time.monotonic() - start, flush=True)
"""


class Server:
    """Runs commands in `folder`, each in a fork of one process."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SERVER), str(model)], cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "core"), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        """The next answer, within `PATIENCE` seconds."""
        assert self.process.stdout is not None
        limit = threading.Timer(PATIENCE, os.killpg, (self.process.pid, signal.SIGKILL))
        limit.start()
        try:
            line = self.process.stdout.readline()
        finally:
            limit.cancel()
        assert line, f"no answer within {PATIENCE:.0f} s"
        return line.strip()

    def run(self, *arguments: str, after: float = 0.0) -> tuple[int, float]:
        """(exit status, seconds); killed `after` so many, if it is still there."""
        assert self.process.stdin is not None
        print(after, *arguments, sep="\t", file=self.process.stdin, flush=True)
        try:
            status, seconds = self._line().split()
        except AssertionError as error:
            raise AssertionError(f"{error}; it wrote:\n{self.log()}") from None
        return int(status), float(seconds)

    def log(self) -> str:
        """What the last one wrote."""
        return (self.folder / "log").read_text()


@pytest.fixture(scope="module")
def server(tiny_pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("kills")
    found = Server(folder, tiny_pixart_folder)
    yield found
    found.process.communicate(timeout=PATIENCE)


JOBS = {
    "quantize": ("quantize", "MODEL", "--scheme", "w4a8"),
    "router": ("train-router", "MODEL", "--reuse", "0.25", "--iterations", "3"),
    "encoder": ("quantize", "MODEL", "--text-encoder", "w4"),
}


@pytest.mark.parametrize("name", JOBS)
def test_killed_at_any_moment(server: Server, tiny_pixart_folder: Path, name: str) -> None:
    check(server, tiny_pixart_folder, name, KILLS // len(JOBS), seed=0)


@pytest.mark.parametrize("name", JOBS)
def test_a_second_job_is_refused(server: Server, tiny_pixart_folder: Path, name: str) -> None:
    """In one sentence, which says what process to look for where the system knows it."""
    arguments = [str(tiny_pixart_folder) if word == "MODEL" else word for word in JOBS[name]]
    with Lock(server.folder / "same.work"):
        status, _ = server.run(*arguments, "--out", "same.safetensors")
    assert status == 2
    owner = f", process {os.getpid()}" if Path("/proc/locks").exists() else ""
    last = server.log().rstrip().splitlines()[-1]
    assert last == (
        f"tenuto: Another job works in same.work{owner}: wait until it is done, or choose "
        "another output."
    )
    assert not (server.folder / "same.safetensors").exists()
    (server.folder / "same.work").rmdir()


def test_a_kill_while_the_artifact_is_written(server: Server, tiny_pixart_folder: Path) -> None:
    """What it left beside the artifact is gone after the next one."""
    part, other = (server.folder / f".{name}.safetensors.1.part" for name in ("left", "right"))
    part.write_bytes(b"half")
    other.write_bytes(b"of another")
    arguments = ("quantize", str(tiny_pixart_folder), "--scheme", "w8a8")
    status, _ = server.run(*arguments, "--out", "left.safetensors")
    assert status == 0, server.log()
    assert not part.exists() and other.read_bytes() == b"of another"
    for path in (other, server.folder / "left.safetensors"):
        path.unlink()


def check(server: Server, model: Path, name: str, kills: int, seed: int) -> list[Any]:
    """Kills a job `kills` times, each time anew, and lets it go on; returns what was there."""
    arguments = [str(model) if word == "MODEL" else word for word in JOBS[name]]
    draw, seen = random.Random(f"{name} {seed}"), []
    whole, cut = (f"{name}-{end}.safetensors" for end in ("whole", "cut"))
    status, seconds = server.run(*arguments, "--out", whole)
    assert status == 0, server.log()
    expected = (server.folder / whole).read_bytes()
    before = set(server.folder.iterdir())
    for _ in range(kills):
        moment = max(0.001, draw.random() * seconds)
        status, _ = server.run(*arguments, "--out", cut, after=moment)
        assert status in (-9, 0)
        work = server.folder / f"{name}-cut.work"
        left = sorted(str(p.relative_to(work)) for p in work.rglob("*")) if work.exists() else []
        seen.append((round(moment, 3), status, left))
        if status == -9 and (server.folder / cut).exists():
            assert (server.folder / cut).read_bytes() == expected, "half written"
        status, _ = server.run(*arguments, "--out", cut)
        assert status == 0, (seen[-1], server.log())
        assert (server.folder / cut).read_bytes() == expected, seen[-1]
        (server.folder / cut).unlink()
        assert set(server.folder.iterdir()) == before, seen[-1]
    return seen
