"""Long work in a process of its own: what the app shows is a view of the `Job` that follows it.

The process (`worker`) says as JSON lines how far it is. It ends when its standard input does, so it
outlives neither a Stop nor the app; what it had finished is in the library's NAME.work folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tenuto

from .failures import ended
from .time_left import in_all, use_of

PATIENCE = 0.25  # seconds that a worker has to stop by itself
WAITING, RUNNING, STOPPING = "waiting", "running", "stopping"
STOPPED, FAILED, DONE = "stopped", "failed", "done"
WORKER = "import sys; from tenuto.cli.app import module; sys.exit(module('worker').main())"

SAID = {  # what a worker says, and of which type
    "stage": str, "note": str, "part": int, "parts": int, "done": int, "total": int, "loss": list,
    "map": dict, "error": str, "result": dict,
}  # fmt: skip


class Job:
    """One calibration or comparison: its process, and all that is known of how far it is."""

    def __init__(
        self,
        kind: str,
        request: dict[str, Any],
        log: Path,
        expected: Sequence[tuple[int, float | None]] = (),
    ) -> None:
        self.expected = expected
        self.id, self.kind, self.request, self.log = uuid.uuid4().hex[:12], kind, request, log
        self.state, self.error, self.place = WAITING, "", 0  # place: in line, from 1 on
        self.stage, self.note, self.part, self.parts = "Starting", "", 0, 0
        self.done, self.total = 0, 0
        self.loss: list[float] = []
        self.map: dict[str, Any] | None = None
        self.result: dict[str, Any] = {}
        self.began = self.stage_began = self.ended = time.monotonic()
        self.use_began = self.began  # of the parts that belong together, such as recording first
        self.stage_first = 0  # where the stage was when it began: resumed work starts further on
        self._process: subprocess.Popen[str] | None = None
        self.over = threading.Event()

    @property
    def alive(self) -> bool:
        """Whether the work goes on, or is to begin."""
        return self.state in (WAITING, RUNNING, STOPPING)

    @property
    def begun(self) -> bool:
        """Whether its process was started."""
        return self._process is not None

    @property
    def seconds(self) -> float:
        """How long it has run."""
        if self.state == WAITING:
            return 0.0
        return (time.monotonic() if self.alive else self.ended) - self.began

    @property
    def left(self) -> float | None:
        """Seconds until the stage is done, if it goes on as until now: an estimate, or None."""
        gone, moved = time.monotonic() - self.stage_began, self.done - self.stage_first
        if self.state != RUNNING or moved <= 0 or gone < 1:
            return None
        return gone * (self.total - self.done) / moved

    @property
    def left_in_all(self) -> float | None:
        """Seconds until everything is done: an estimate, or None where the check had none."""
        gone = time.monotonic() - self.use_began
        return in_all(self.expected, self.part, self.left, gone)

    def facts(self) -> dict[str, Any]:
        """All that is known, as plain data. place: in line, from 1 on; 0 where it has begun."""
        return {
            "id": self.id, "state": self.state, "place": self.place, "stage": self.stage,
            "part": self.part, "parts": self.parts, "done": self.done, "total": self.total,
            "note": self.note, "seconds": round(self.seconds, 3), "loss": self.loss,
            "error": self.error, "result": self.result, "at": time.time(),
        }  # fmt: skip

    def start(self, when_over: Callable[[], None]) -> None:
        """Start the process; `when_over` is called when it has ended, however it ends."""
        self.state = RUNNING
        self.began = self.stage_began = self.ended = self.use_began = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        root = str(Path(tenuto.__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, encoding="utf-8", errors="replace", start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
        threading.Thread(target=self._follow, args=(when_over,), daemon=True).start()

    def stop(self) -> None:
        """Ask the process to stop, and end it if it has not stopped after `PATIENCE`."""
        process = self._process
        if self.state != RUNNING or process is None:
            return
        self.state = STOPPING
        with contextlib.suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()
        killer = threading.Timer(PATIENCE, process.kill)
        killer.daemon = True
        killer.start()

    def _follow(self, when_over: Callable[[], None]) -> None:
        """Take what the process says until it ends."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(OSError, ValueError):  # it ended, or was stopped, at once
                process.stdin.write(json.dumps(self.request | {"kind": self.kind}) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                self.take(_event(line))
            code = process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):
                process.stdin.close()
            self._end(code)
        finally:
            if self.alive:  # it could not be followed to its end
                process.kill()
                self._end(process.wait())
            self.ended = time.monotonic()
            try:
                when_over()
            finally:
                self.over.set()

    def take(self, event: dict[str, Any]) -> None:
        """Take over what the process says; what is of another type than it should be is left."""
        event = {
            name: value for name, value in event.items() if isinstance(value, SAID.get(name, ()))
        }
        if event.get("stage", self.stage) != self.stage or event.get("part", 0) > self.part:
            self.stage_began, self.stage_first = time.monotonic(), event.get("done", 0)
            if use_of(self.expected, event.get("part", 0)) != use_of(self.expected, self.part):
                self.use_began = self.stage_began
        self.result |= event.pop("result", {})
        for name, value in event.items():
            setattr(self, name, value)

    def _end(self, code: int) -> None:
        if self.result:
            self.state = DONE
        elif self.state == STOPPING:
            self.state = STOPPED
        else:
            self.state = FAILED
            self.error = self.error or ended(code)


def _event(line: str) -> dict[str, Any]:
    """What a line of the process says: nothing, where it is half a line of one that was killed."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


NAMES = {"calibrate": "calibration", "compare": "comparison", "export": "export"}
