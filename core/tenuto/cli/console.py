"""What the command shows: progress bars on stderr, and an artifact as a short table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TextIO

from ..progress import Progress

DELAY = 2.0  # seconds: shorter work shows no bar where nobody watches
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"


@dataclass(frozen=True)
class Answer:
    """What a command found: text for people, plain data for `--json`."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)


class Bars:
    """Progress bars on `stream`, one at a time: at once on a terminal, else after two seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.watched = stream.isatty()
        self._bar: Any = None

    def settings(self, label: str) -> dict[str, Any]:
        """How a tqdm bar called `label` is drawn."""
        pace: dict[str, Any] = {"mininterval": 5.0, "delay": DELAY, "ncols": 79}
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
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)

        return progress

    def close(self) -> None:
        """Finish the bar in progress."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
