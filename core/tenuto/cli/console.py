"""What the command shows: progress bars on stderr, and an answer in lines that fit a terminal."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass, field
from typing import Any, TextIO

from ..progress import Progress

DELAY = 2.0  # seconds: shorter work shows no bar where nobody watches
WIDTH = 80  # columns of a terminal unless it says otherwise
BAR = "{desc}: {percentage:3.0f}%|{bar:12}| {elapsed}<{remaining}{postfix}"
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


class Bars:
    """Progress bars on `stream`, one at a time: at once on a terminal, else after two seconds.

    Without a stream there are none.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream
        self.watched = stream is not None and stream.isatty()
        self._bar: Any = None

    def settings(self, label: str) -> dict[str, Any]:
        """How a tqdm bar called `label` is shown."""
        if self.stream is None:
            return {"disable": True}
        pace: dict[str, Any] = {"mininterval": 5.0, "delay": DELAY, "ncols": WIDTH - 1}
        if self.watched:
            pace = {"mininterval": 0.2, "dynamic_ncols": True}
        return {"desc": label, "file": self.stream, "bar_format": BAR} | pace

    def __call__(self, label: str) -> Progress:
        """A new bar; returns the `on_progress` that moves it."""
        self.close()

        def progress(done: int, total: int, note: str) -> None:
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, initial=done, **self.settings(label))
            self._bar.total = total
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
