"""Progress of long work: what `on_progress` is called with, several parts on one scale, bars."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

Progress = Callable[[int, int, str], None]
Shown = Progress | bool | None  # what a long public function takes; see `shown`

WIDTH = 80  # columns of a terminal unless it says otherwise
BAR = "{desc}: {percentage:3.0f}%|{bar:12}| {elapsed}<{remaining}{postfix}"
LINE = "{desc}: {percentage:.0f} %, {elapsed} so far, {remaining} left{postfix}"  # in a file
MOVES = re.compile(r"\r|\x1b\[A")  # to the beginning of a line, to the one above
SOONEST, LATEST, SHARE = 10.0, 60.0, 0.1  # seconds from line to line, as a share of the time so far
BESIDE = 39  # columns of a bar but for its label and note, with hours of time
LAST = 0.99  # of a bar, at most, until what it is of is over


def parts(
    on_progress: Progress | None, sizes: Mapping[str, int], *, named: bool = False
) -> dict[str, Progress]:
    """The progress of each part of a job, from 0 to a total of its own, on the scale of the whole.

    sizes: what each part is worth, in the order in which they are done; the whole is their sum.
    named: notes begin with the name of the part.
    """
    whole, before = sum(sizes.values()), 0
    found: dict[str, Progress] = {}
    for name, size in sizes.items():
        found[name] = _part(on_progress, name if named else "", before, size, whole)
        before += size
    return found


def _part(on_progress: Progress | None, name: str, before: int, size: int, whole: int) -> Progress:
    def progress(done: int, total: int, note: str) -> None:
        if on_progress is not None:
            on_progress(before + size * done // max(1, total), whole, f"{name} {note}".strip())

    return progress


class Lines:
    """What a bar writes on a stream that is no terminal: whole lines, each once.

    Where it would write over its last line, as it does on a terminal, a new one begins.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._last = stream, ""

    def write(self, text: str) -> None:
        """Print the lines of `text` that say something new."""
        for line in (part.rstrip() for part in MOVES.sub("\n", text).splitlines()):
            if line and line != self._last:
                self.stream.write(f"{line}\n")
                self._last = line

    def flush(self) -> None:
        """Let a reader of the file see them now."""
        self.stream.flush()


class Bars:
    """Progress bars on `stream`, one at a time: at once on a terminal (`watched`).

    Elsewhere, in the log of a job, they are lines: one every ten seconds to a minute and the last,
    none of what takes less. Without a stream there are none. A bar says 100 % and that no time is
    left when the work is over, not before. stages: labels of the bars that will follow each other,
    which are numbered then.
    """

    def __init__(self, stream: TextIO | None = None, watched: bool | None = None) -> None:
        self.stream = stream
        self.watched = stream is not None and stream.isatty() if watched is None else watched
        self.stages = list[str]()
        self._bar: Any = None
        self._done = 0
        self._form = BAR if self.watched else LINE

    def settings(self, label: str) -> dict[str, Any]:
        """How a tqdm bar called `label` is shown."""
        if self.stream is None:
            return {"disable": True}
        if self.watched:
            pace: dict[str, Any] = {"mininterval": 0.2, "dynamic_ncols": True, "miniters": 0}
            pace["smoothing"] = 0  # what is left by the time so far: parts are sized by theirs
            return {"desc": label, "file": self.stream, "bar_format": self._form} | pace
        pace = {"mininterval": SOONEST, "miniters": 1, "delay": SOONEST, "ncols": WIDTH - 1}
        pace["smoothing"] = 0
        return {"desc": label, "file": Lines(self.stream), "bar_format": self._form} | pace

    def __call__(self, label: str) -> Progress:
        """A new bar; returns the `on_progress` that moves it."""
        self.close()
        if len(self.stages) > 1 and label in self.stages:
            label = f"{self.stages.index(label) + 1}/{len(self.stages)} {label}"

        def progress(done: int, total: int, note: str) -> None:
            at_most = min(done, LAST * total)
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, initial=at_most, **self.settings(label))
            self._bar.total, self._done = total, done
            self._bar.bar_format = self._form if done < total else _soon_over(self._form)
            if self.stream is not None and not self.watched:
                so_far = SHARE * (time.time() - self._bar.start_t)
                self._bar.mininterval = min(max(SOONEST, so_far), LATEST)
            self._bar.set_postfix_str(self._short(label, note), refresh=False)
            self._bar.update(at_most - self._bar.n)

        return progress

    def _short(self, label: str, note: str) -> str:
        """A note that leaves the bar its place: its middle is left out where it is too long."""
        columns = shutil.get_terminal_size((WIDTH, 24)).columns if self.watched else WIDTH
        most = max(10, columns - BESIDE - len(label))
        half = (most - 1) // 2
        return note if len(note) <= most else f"{note[: most - 1 - half]}…{note[-half:]}"

    def note(self, sentence: str) -> None:
        """One line that is worth a word before the work begins."""
        if self.stream is not None:
            self.close()
            self.stream.write(f"tenuto: note: {sentence}\n")

    def close(self) -> None:
        """Finish the bar in progress."""
        if self._bar is not None:
            self._bar.n, self._bar.bar_format = self._done, self._form
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _soon_over(form: str) -> str:
    """A bar whose parts are all done, while what follows them is not: no time is named."""
    return form.replace("{remaining} left", "soon over").replace("{remaining}", "soon")


@contextmanager
def shown(on_progress: Shown, label: str, able: bool = True) -> Iterator[Progress | None]:
    """What a long function calls: `on_progress` itself; where that is True, a bar called `label`.

    The bar is on stderr and ends with the context. Where stderr is neither a terminal nor a
    notebook's, in a host's or a job's log, nothing is shown, as with None and False. able: whether
    there may be a bar.
    """
    stream: TextIO | None = sys.stderr  # None of a Windows program without a console
    if not isinstance(on_progress, bool):
        yield on_progress
    elif on_progress and able and stream is not None and (stream.isatty() or _in_notebook()):
        with Bars(stream, watched=True) as bars:
            yield bars(label)
    else:
        yield None


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", ())
