"""The app in a window of its own, by pywebview."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

SIZE = (1200, 900)
SCREENS = ("DISPLAY", "WAYLAND_DISPLAY")


def missing() -> str | None:
    """One sentence on why there can be no window, or None where there can."""
    if importlib.util.find_spec("webview") is None:
        return "pywebview is not installed (pip install 'tenuto[desktop]')."
    if sys.platform != "linux":
        return None
    offscreen = os.environ.get("QT_QPA_PLATFORM") == "offscreen"
    if not offscreen and not any(os.environ.get(name) for name in SCREENS):
        return "there is no screen."
    found = [name for name in ("PySide6", "PyQt6", "gi") if importlib.util.find_spec(name)]
    if not found:
        return "pywebview draws with PySide6, which is not installed."
    return None


def show(url: str, out: Path, then: Any = None) -> None:
    """Open the window and return when it is closed. then(window): called when it is there."""
    webview = importlib.import_module("webview")

    webview.settings["ALLOW_DOWNLOADS"] = True  # or Download does nothing
    window = webview.create_window("Tenuto", url, width=SIZE[0], height=SIZE[1])
    store = out / ".window"
    webview.start(
        then, window if then is not None else None, private_mode=False, storage_path=str(store)
    )
