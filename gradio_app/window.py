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
    if not any(importlib.util.find_spec(name) for name in ("PySide6", "PyQt6", "gi")):
        return "what pywebview draws with is missing (pip install 'tenuto[desktop]')."
    return None


def show(url: str, out: Path, then: Any = None) -> None:
    """Open the window and return when it is closed. then(window): called when it is there."""
    webview = importlib.import_module("webview")

    webview.settings["ALLOW_DOWNLOADS"] = True  # or Download does nothing
    qt = sys.platform == "linux" and importlib.util.find_spec("PySide6") is not None
    if qt:
        mend_downloads()
    window = webview.create_window("Tenuto", url, width=SIZE[0], height=SIZE[1])
    store = out / ".window"
    webview.start(
        then, window if then is not None else None, gui="qt" if qt else None,
        private_mode=False, storage_path=str(store),
    )  # fmt: skip


def mend_downloads() -> None:
    """Give Qt 6 the method of Qt 5 by which pywebview 6.2 says where a download is to go."""
    kind = importlib.import_module("PySide6.QtWebEngineCore").QWebEngineDownloadRequest

    def set_path(download: Any, path: str) -> None:
        download.setDownloadDirectory(str(Path(path).parent))
        download.setDownloadFileName(Path(path).name)

    if not hasattr(kind, "setPath"):
        kind.setPath = set_path
