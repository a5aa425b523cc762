"""`KeptChoices`: on disk, which kernel a card was fastest with, so that it is timed once."""

from __future__ import annotations

import json
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from ..resources import __version__

FILE = Path(".cache") / "tenuto" / "choices.json"  # in the user's folder
MOST = 4096  # choices: beyond, the oldest goes


class KeptChoices:
    """A file of choices by card, versions, mode and kind of layer.

    path: None is `FILE` in the user's folder. A file that cannot be read or written is none. It is
    read once, and again before it is written, for the choices of other processes.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def get(self, mode: Any, kind: Hashable, card: torch.device) -> str | None:
        """What was chosen for layers on `card`; None: nothing yet."""
        with self._lock:
            if self._known is None:
                self._known = self._read()
            found = self._known.get(_key(mode, kind, card))
        return found if isinstance(found, str) else None

    def add(self, mode: Any, kind: Hashable, card: torch.device, name: str) -> None:
        """Keep a choice; another process that writes at once may lose its own."""
        key = _key(mode, kind, card)
        with self._lock:
            known = self._read()
            known.pop(key, None)
            known[key] = name  # the newest is the last one
            known = dict([*known.items()][-MOST:])
            try:
                write_text(self._path(), json.dumps(known, indent=0))
            except (OSError, RuntimeError):  # the latter: there is no user's folder
                return
            self._known = known

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path().read_text(encoding="utf-8"))
        except (OSError, RuntimeError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _path(self) -> Path:
        return Path.home() / FILE if self.path is None else self.path


def _key(mode: Any, kind: Hashable, card: torch.device) -> str:
    """The card by its name: its number may be another one's tomorrow."""
    name = torch.cuda.get_device_name(card) if torch.cuda.is_available() else "no card"
    parts = [p for p in kind if p != card] if isinstance(kind, tuple) else [kind]
    return f"{name} | torch {torch.__version__} | tenuto {__version__} | {mode} | {parts}"
