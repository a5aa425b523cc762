"""How far the images of one press of Generate are: made in a thread while the page shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from .jobs import RUNNING, WAITING
from .view import WAITS, card, counted, lasting, progress_bar

PACE = 0.5  # seconds between two looks
Made = TypeVar("Made")


def meanwhile(
    work: Callable[[], Made], look: Callable[[], Any], pace: float = PACE
) -> Generator[Any, None, Made]:
    """What `work` returns or raises; yields `look()` at once, and every `pace` seconds until then.

    It works in a thread that ends with it, also where nobody asks for the rest.
    """
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    yield look()
    while not wait([future], pace).done:
        yield look()
    return future.result()


def starting(waits: bool) -> str:
    """The place of progress when Generate was pressed. waits: for the image of another page."""
    said = f"In line behind another image. {WAITS}" if waits else "Starting"
    return progress_bar("Generating", 0, 0, [said])


@dataclass
class Far:
    """How far image `number` of `count` is, from 1 on. The thread that makes it writes the rest.

    place: in line, from 1 on; 0 where it has begun. done, total: calls of the denoiser, 0 while the
    model is loaded. began: when the first of them did, by the monotonic clock.
    """

    number: int = 1
    count: int = 1
    place: int = 0
    done: int = 0
    total: int = 0
    began: float = 0.0

    def on_call(self, done: int, total: int) -> None:
        """Before each call."""
        if not self.total:
            self.began = time.monotonic()
        self.place, self.done, self.total = 0, done, total

    def on_wait(self, place: int) -> None:
        """While it stands in line."""
        self.place = place

    @property
    def left(self) -> float | None:
        """Seconds until the image is made, if it goes on as until now; None if it is too early."""
        gone = time.monotonic() - self.began
        if not self.done or gone < 1:
            return None
        return gone * (self.total - self.done) / self.done

    @property
    def title(self) -> str:
        """What is done."""
        if self.place:
            return f"In line, place {self.place}."
        what = f"Image {self.number} of {self.count}" if self.count > 1 else "Generating"
        return what if self.total else f"{what}: loading the model"

    def bar(self) -> str:
        """For the place below the buttons: all of it, in a line below the bar."""
        return progress_bar(self.title, self.done, self.total, [self.title, *self._words()])

    def card(self) -> str:
        """For the place of the numbers, while there is no image of this press."""
        if self.place:
            return card(WAITING, self.title, WAITS)
        words = progress_bar(self.title, self.done, self.total, self._words())
        return card(RUNNING, self.title, "", words)

    def _words(self) -> list[str]:
        if self.place:
            return [WAITS]
        if not self.total:
            return []
        gone, left = time.monotonic() - self.began, self.left
        said = [f"{self.done} of {counted(self.total, 'call', 'calls')}", f"{lasting(gone)} so far"]
        if left is not None:
            later = (self.count - self.number) * (gone + left)
            whole = f" of this image, {lasting(left + later)} in all" if later else ""
            said.append(f"about {lasting(left)} left{whole}")
        return said
