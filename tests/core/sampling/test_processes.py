"""Several processes of one job: what each computes, all have; none waits for one that ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tenuto.errors import TenutoError
from tenuto.resume import Work
from tenuto.sampling.processes import NEEDED, Processes, launched, launched_size
from tenuto.sampling.shared_work import work_in
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[3]
GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()
several = pytest.mark.skipif(not GLOO, reason="this torch has no gloo")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def launch(words: list[str], size: int = 2, **environment: str) -> Iterator[list[Any]]:
    """`python WORDS` as a launcher starts it, `size` times; what is left at the end is killed."""
    shared = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "core"), str(ROOT)]), "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | shared | {"RANK": str(i), "LOCAL_RANK": str(i)} | environment,
        )
        for i in range(size)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ran(code: str, size: int = 2) -> list[tuple[int, str, str]]:
    """(exit status, what was printed, what was complained of) of each process with such a body."""
    start = """
        import os, signal, sys, time
        from datetime import timedelta
        import torch
        from tenuto.errors import ModelError, TenutoError
        from tenuto.sampling.processes import launched, processes
        rank = int(os.environ["RANK"])
    """
    text = textwrap.dedent(start) + textwrap.dedent(code)
    with launch(["-c", text], size) as started:
        said = [process.communicate(timeout=PATIENCE) for process in started]
        return [(p.returncode, *words) for p, words in zip(started, said, strict=True)]


# --- one process ----------------------------------------------------------------------------------


def test_one_process_does_it_all(tmp_path: Path) -> None:
    one = Processes()
    order = list[str]()
    found = one.each("ab", lambda x: order.append(x) or x * 2)
    assert not order and list(found) == ["aa", "bb"] and order == ["a", "b"]
    assert one.once(lambda: 3) == 3 and one.first
    assert type(work_in(tmp_path / "work", {})) is Work


@pytest.mark.parametrize("left_out", [*NEEDED, ""])
def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch, left_out: str) -> None:
    """A number of processes alone, which batch systems set too, is no launch."""
    for name in NEEDED:
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv(left_out or "LOCAL_RANK", raising=False)
    assert launched_size() == (1 if left_out else 2)
    if left_out:
        with launched() as here:
            assert here.size == 1


def test_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NEEDED:
        monkeypatch.setenv(name, "1" if name == "RANK" else "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(TenutoError, match="on one machine"), launched():
        pass


# --- several --------------------------------------------------------------------------------------


@several
def test_each_item_is_computed_once_and_all_have_it_in_order(tmp_path: Path) -> None:
    """Values of every kind, in the order of the items; what cannot be sent is computed by each."""
    found = ran(f"""
        import json
        from tenuto.sampling.shared_work import work_in
        mine = []

        def compute(i):
            mine.append(i)
            x = torch.arange(6).view(2, 3).T * i
            return {{"x": x, "same": [x, x], 7: (None, 0.1 * i, "a"), "none": torch.zeros(0, 2),
                    "half": torch.full((), i, dtype=torch.bfloat16), "yes": x > 2}}

        with launched() as here:
            given = list(here.each(range(5), compute))
            inner = list(here.each(range(2), lambda i: list(processes().each("ab", str.upper))))
            once = here.once(lambda: rank)
            odd = [type(x).__name__ for x in here.each(range(3), lambda i: {{i}})]
            right = all(
                torch.equal(g["x"], torch.arange(6).view(2, 3).T * i)
                and g["same"][1].dtype == torch.int64 and g[7] == (None, 0.1 * i, "a")
                and g["none"].shape == (0, 2) and float(g["half"]) == i
                and g["half"].dtype == torch.bfloat16 and g["yes"].dtype == torch.bool
                for i, g in enumerate(given)
            )
            for folder in (None, {str(tmp_path / "work")!r}):
                work = work_in(folder, {{"a": 1}})
                before = work.load("u/1")
                work.save("u/1", {{"a": torch.ones(2) * (rank + 1)}})
                kept = float(work.load("u/1")["a"][1]), float(work.part("u/1", "a")["a"][0])
                assert before is None and kept == (1.0, 1.0), kept
                work.discard()
        print(json.dumps([mine, right, inner, once, odd, here.first]))
    """)
    for rank, (code, said, wrong) in enumerate(found):
        assert code == 0, wrong
        mine = [i for i in range(5) if i % 2 == rank]
        wanted = [["A", "B"]] * 2
        assert json.loads(said) == [mine, True, wanted, 0, ["set"] * 3, rank == 0]
    assert not (tmp_path / "work").exists()


@several
def test_an_error_in_one_is_an_error_in_all() -> None:
    """Of the same kind and words, and all can go on."""
    found = ran("""
        def compute(i):
            if i == 1:
                raise ModelError("No such thing.")
            return i

        with launched() as here:
            try:
                list(here.each(range(3), compute))
            except ModelError as error:
                print(error, getattr(error, "elsewhere", False))
            print(here.once(lambda: "on"))
    """)
    assert [said.splitlines() for _, said, _ in found] == [
        ["No such thing. True", "on"], ["No such thing. False", "on"],
    ]  # fmt: skip


@several
@pytest.mark.parametrize("how", ["killed", "stopped", "silent"])
def test_none_waits_for_ever(how: str) -> None:
    """For one that is killed, that leaves with an error of its own, or that says nothing."""
    start = time.monotonic()
    found = ran(
        f"""
        how = {how!r}
        with launched(timedelta(seconds=2 if how == "silent" else 500)) as here:
            here.meet()
            try:
                if rank and how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if rank and how == "stopped":
                    raise KeyboardInterrupt
                if rank:
                    time.sleep(6)
                    os._exit(1)
                list(here.each(range(4), lambda i: i))
            except TenutoError as error:
                print(error)
                os._exit(2)
    """,
        size=3 if how == "killed" else 2,
    )
    assert time.monotonic() - start < 450, "before the time that was given"
    assert found[0][0] == 2 and "Another process" in found[0][1]
    assert found[1][0] == {"killed": -signal.SIGKILL, "stopped": -signal.SIGINT, "silent": 1}[how]
