"""`KeptChoices`: on disk, which kernel a card was fastest with, so that it is timed once."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

FILE = Path(".cache") / "tenuto" / "choices.json"  # in the user's folder
MOST = 4096  # choices: the file starts anew beyond


class KeptChoices:
    """A file of choices by card, versions, mode and kind of layer.

    path: None is `FILE` in the user's folder. A file that cannot be read or written is none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def get(self, mode: Any, kind: Hashable) -> str | None:
        """What was chosen; None: nothing yet."""
        found = self._read().get(_key(mode, kind))
        return found if isinstance(found, str) else None

    def add(self, mode: Any, kind: Hashable, name: str) -> None:
        """Keep a choice; another process that writes at once may lose its own."""
        known = self._read()
        known = known if len(known) < MOST else {}
        try:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            number, part = tempfile.mkstemp(".part", path.name, path.parent)
            with os.fdopen(number, "w", encoding="utf-8") as file:
                json.dump(known | {_key(mode, kind): name}, file, indent=0, sort_keys=True)
            Path(part).replace(path)
        except (OSError, RuntimeError):  # the latter: there is no user's folder
            return

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path().read_text(encoding="utf-8"))
        except (OSError, RuntimeError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _path(self) -> Path:
        return Path.home() / FILE if self.path is None else self.path


def _key(mode: Any, kind: Hashable) -> str:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    return f"{card} | torch {torch.__version__} | tenuto {__version__} | {mode} | {kind}"
