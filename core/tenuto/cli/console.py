"""What the command shows: progress bars on stderr, and an answer in lines that fit a terminal."""

from __future__ import annotations

import re
import shutil
import textwrap
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

from ..progress import Progress

WIDTH = 80  # columns of a terminal unless it says otherwise
BAR = "{desc}: {percentage:3.0f}%|{bar:12}| {elapsed}<{remaining}{postfix}"
LINE = "{desc}: {percentage:.0f} %, {elapsed} so far, {remaining} left{postfix}"  # in a file
MOVES = re.compile(r"\r|\x1b\[A")  # to the beginning of a line, to the one above
SOONEST, LATEST, SHARE = 10.0, 60.0, 0.1  # seconds from line to line, as a share of the time so far
NOTE = 22  # columns of WIDTH that are left beside the longest label and hours of time


@dataclass(frozen=True)
class Answer:
    """What a command found: text for people, plain data for `--json`, and what to do next.

    code: the exit code.
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    next: str = ""
    code: int = 0

    def __str__(self) -> str:
        """The text in lines of at most 80 columns (but for what cannot be broken), then `next`."""
        lines = [part for line in self.text.splitlines() for part in _fitted(line)]
        return "\n".join([*lines, *([f"Next: {self.next}"] if self.next else [])])


def _fitted(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    found = textwrap.wrap(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return found if len(line) > WIDTH else [line]


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
                print(line, file=self.stream)
                self._last = line

    def flush(self) -> None:
        """Let a reader of the file see them now."""
        self.stream.flush()


class Bars:
    """Progress bars on `stream`, one at a time: at once on a terminal.

    Elsewhere, in the log of a job, they are lines: one every ten seconds to a minute and the last,
    none of what takes less. Without a stream there are none.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream
        self.watched = stream is not None and stream.isatty()
        self._bar: Any = None

    def settings(self, label: str) -> dict[str, Any]:
        """How a tqdm bar called `label` is shown."""
        if self.stream is None:
            return {"disable": True}
        if self.watched:
            pace: dict[str, Any] = {"mininterval": 0.2, "dynamic_ncols": True}
            return {"desc": label, "file": self.stream, "bar_format": BAR} | pace
        pace = {"mininterval": SOONEST, "miniters": 1, "delay": SOONEST, "ncols": WIDTH - 1}
        return {"desc": label, "file": Lines(self.stream), "bar_format": LINE} | pace

    def __call__(self, label: str) -> Progress:
        """A new bar; returns the `on_progress` that moves it."""
        self.close()

        def progress(done: int, total: int, note: str) -> None:
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, initial=done, **self.settings(label))
            self._bar.total = total
            if self.stream is not None and not self.watched:
                so_far = SHARE * (time.time() - self._bar.start_t)
                self._bar.mininterval = min(max(SOONEST, so_far), LATEST)
            self._bar.set_postfix_str(self._short(note), refresh=False)
            self._bar.update(done - self._bar.n)

        return progress

    def _short(self, note: str) -> str:
        """A note that leaves the bar its place: its middle is left out where it is too long."""
        columns = shutil.get_terminal_size((WIDTH, 24)).columns if self.watched else WIDTH
        most = max(NOTE, NOTE + columns - WIDTH)
        half = (most - 1) // 2
        return note if len(note) <= most else f"{note[: most - 1 - half]}…{note[-half:]}"

    def note(self, sentence: str) -> None:
        """One line that is worth a word before the work begins."""
        if self.stream is not None:
            self.close()
            print(f"tenuto: note: {sentence}", file=self.stream)

    def close(self) -> None:
        """Finish the bar in progress."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
