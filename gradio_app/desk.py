"""One thing at a time: what is asked for meanwhile stands in line, and begins by itself."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tenuto.errors import Cancelled, TenutoError

from .jobs import FAILED, STOPPED, WAITING, Job

REMEMBERED = 20  # jobs that can be asked for by their id, once they are over
LONGEST = 20  # the line
LOOK = 0.2  # seconds between two looks at an image that stands in line
IMAGE = "image"


class Turn:
    """An image in line; it is made by who asked for it. text: what is shown of it."""

    kind = IMAGE

    def __init__(self, text: str) -> None:
        self.id, self.text, self.place = uuid.uuid4().hex[:12], text, 0
        self.state, self.begun = WAITING, threading.Event()


class Desk:
    """A job, or an image that is generated, and the line behind it. It knows the last jobs."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._now: Job | Turn | None = None
        self._line: list[Job | Turn] = []
        self._jobs: dict[str, Job] = {}
        self._last: dict[str, Job] = {}
        self._after: dict[str, Callable[[Job], None]] = {}

    # --- the line -------------------------------------------------------------------------------

    def start(self, job: Job, after: Callable[[Job], None] | None = None) -> Job:
        """Start `job`, or put it in line. after(job): when it is over, or was taken out of it."""
        with self._lock:
            if after is not None:
                self._after[job.id] = after
            self._join(job)
            self._jobs[job.id] = job
            over = [key for key, old in self._jobs.items() if not old.alive]
            for key in over[: max(0, len(over) - REMEMBERED)]:
                del self._jobs[key]
            trouble = self._next()
        if trouble is not None and trouble[0] is job:
            raise trouble[1]
        return job

    @contextmanager
    def turn(
        self,
        text: str,
        on_wait: Callable[[int], None] = lambda place: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[None]:
        """Within it an image may be generated; waits in line for that.

        on_wait(place) is called while it waits. Cancelled where `stopped` says so by then, or where
        it was taken out of the line.
        """
        mine = Turn(text)
        with self._lock:
            self._join(mine)
            self._next()
        try:
            while not mine.begun.wait(LOOK):
                if mine.state == STOPPED or stopped():
                    raise Cancelled
                on_wait(mine.place)
            yield
        finally:
            with self._lock:
                if mine in self._line:
                    self._leave(mine)
                if self._now is mine:
                    self._now = None
                    self._next()

    def _join(self, one: Job | Turn) -> None:
        if len(self._line) >= LONGEST:
            raise TenutoError(f"{LONGEST} jobs stand in line: remove one, or wait.")
        self._line.append(one)
        self._number()

    def _leave(self, one: Job | Turn) -> None:
        self._line.remove(one)
        self._number()

    def _number(self) -> None:
        for place, one in enumerate(self._line, start=1):
            one.place = place

    def _next(self) -> tuple[Job, BaseException] | None:
        """Begin what is first in line, if nothing is at work; returns what could not begin."""
        trouble = None
        while self._now is None and self._line:
            one = self._now = self._line[0]
            self._leave(one)
            one.place = 0
            if isinstance(one, Turn):
                one.begun.set()
                continue
            self._last[one.kind] = one
            try:
                one.start(lambda job=one: self._over(job))
            except BaseException as error:
                trouble = one, error
                one.state, one.error, self._now = FAILED, f"It cannot begin: {error}", None
                self._settle(one)
        return trouble

    def _over(self, job: Job) -> None:
        try:
            self._settle(job)
        finally:
            with self._lock:
                self._now = None
                self._next()

    def _settle(self, job: Job) -> None:
        """Tell who asked for it that a job is over."""
        after = self._after.pop(job.id, None)
        if after is not None:
            after(job)

    def remove(self, key: Any) -> None:
        """Take a job or an image out of the line; nothing happens where it has begun."""
        with self._lock:
            one = next((one for one in self._line if one.id == key), None)
            if one is None:
                return
            self._leave(one)
            one.state, one.place = STOPPED, 0
        if isinstance(one, Job):
            one.ended = time.monotonic()
            self._settle(one)
            one.over.set()

    # --- what is known --------------------------------------------------------------------------

    @property
    def line(self) -> list[Job | Turn]:
        """What stands in line, the next one first."""
        return list(self._line)

    @property
    def busy(self) -> str:
        """What is at work: the kind of a job, "image" for an image, or nothing."""
        now = self._now
        return "" if now is None else now.kind

    @property
    def image(self) -> str:
        """Whether an image is generated ("running"), stands in line ("waiting") or neither."""
        waits = any(isinstance(one, Turn) for one in self.line)
        return "running" if self.busy == IMAGE else "waiting" if waits else "none"

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What the jobs that are not over were asked for, in line too."""
        return [job.request for job in list(self._jobs.values()) if job.alive]

    def check_free(self, out: str) -> None:
        """TenutoError if a job that is not over writes the file `out`."""
        if any(request.get("out") == out for request in self.requests):
            raise TenutoError("That is being made, or stands in line: choose another name.")

    def job(self, key: Any, kind: str) -> Job | None:
        """What runs of that kind; else the one of that id; else the next in line, or the last."""
        found = self._jobs.get(key) if isinstance(key, str) else None
        last = self._last.get(kind)
        if last is not None and last.alive:
            return last  # whatever a browser remembers
        if found is not None and found.kind == kind:
            return found
        waiting = (one for one in self.line if isinstance(one, Job) and one.kind == kind)
        return next(waiting, last)

    def close(self) -> None:
        """Empty the line, stop what runs, and wait until it has stopped, an image too."""
        for one in self.line:
            self.remove(one.id)
        for job in list(self._jobs.values()):
            if job.alive:
                job.stop()
                job.over.wait(5)
        until = time.monotonic() + 5
        while self.busy and time.monotonic() < until:
            time.sleep(0.05)
