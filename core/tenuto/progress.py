"""Progress of long work: what `on_progress` is called with."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
