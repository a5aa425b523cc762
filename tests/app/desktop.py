"""The app's own window on a screen that nobody sees: it starts, draws, saves; then a photograph.

    python tests/app/desktop.py [PICTURE.jpg]

Not part of `make test`: PySide6's browser takes 0.7 GB. It needs `pip install '.[desktop]'` and, on
Debian, `apt install xvfb xdotool libxcb-cursor0 libxcb-icccm4 libxcb-keysyms1
libxkbcommon-x11-0 libnss3 libasound2 libegl1`.
"""

from __future__ import annotations

import functools
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCREEN = (1240, 1000)
READY = "!!document.querySelector('#generate')"
DRAWN = "!!document.querySelector('#generate-slider img')"
SAVE = "#generate-image a[download], #generate-image button[aria-label*=ownload]"
IMAGE = f"document.querySelector('{SAVE}')"


def main(picture: Path | None) -> None:
    """Run everything; AssertionError where the window does not do what it should."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        screen = subprocess.Popen(
            ["Xvfb", "-displayfd", "1", "-fbdir", folder, "-screen", "0",
             f"{SCREEN[0]}x{SCREEN[1]}x24"], stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert screen.stdout is not None
        os.environ["DISPLAY"] = f":{screen.stdout.readline().strip()}"
        if os.geteuid() == 0:
            os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"
        try:
            seen = opened(base)
        finally:
            screen.terminate()
    assert seen.get("error") is None, seen["error"]
    times = [f"{name} after {seen[name]:.1f} s" for name in ("window", "picture")]
    print(", ".join([*times, seen["saved"]]))
    if picture is not None:
        seen["screen"].save(picture, quality=85)


def opened(base: Path) -> dict[str, Any]:
    """Run the command in this process, with a script at the window."""
    sys.path.insert(0, str(ROOT / "core"))
    from tenuto import cli
    from tenuto.cli.app import module

    seen: dict[str, Any] = {}
    window = module("window")
    began = time.monotonic()
    window.show = functools.partial(window.show, then=functools.partial(drive, seen, base, began))
    code = cli.main(["app", "--desktop", "--out", str(base / "out")])
    assert code == 0
    return seen


def drive(seen: dict[str, Any], base: Path, began: float, window: Any) -> None:
    """What a user does; the window is closed at the end."""
    try:
        until(window, READY)
        seen["window"] = time.monotonic() - began
        window.evaluate_js("document.querySelector('#generate').click()")
        until(window, DRAWN)
        seen["picture"] = time.monotonic() - began
        time.sleep(1)
        seen["screen"] = photograph(base / "Xvfb_screen0")
        drawn = sorted((base / "out" / "pictures").glob("*.png"))
        assert len(drawn) == 2, drawn
        target = base / "saved.png"
        window.evaluate_js("document.querySelector('input[type=radio][value=B]').click()")
        until(window, f"!!{IMAGE}")
        window.evaluate_js(f"{IMAGE}.click()")
        typed(str(target), target)
        assert target.read_bytes() in [path.read_bytes() for path in drawn]
        seen["saved"] = f"saved {target.name} of {target.stat().st_size} bytes through the dialog"
    except BaseException as error:
        seen["error"] = repr(error)
        seen.setdefault("screen", photograph(base / "Xvfb_screen0"))
    finally:
        window.destroy()


def until(window: Any, condition: str, seconds: float = 90) -> None:
    """Wait until a condition holds in the page."""
    end = time.monotonic() + seconds
    while not window.evaluate_js(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.2)


def typed(text: str, target: Path) -> None:
    """Fill in the dialog that asks where to save, and wait for the file."""
    time.sleep(2)
    for keys in (("key", "ctrl+a"), ("type", text), ("key", "Return")):
        subprocess.run(["xdotool", *keys], check=True)
        time.sleep(0.5)
    end = time.monotonic() + 20
    while not (target.exists() and target.stat().st_size):
        assert time.monotonic() < end, "the file was not saved"
        time.sleep(0.2)


def photograph(file: Path) -> Any:
    """The screen as Xvfb keeps it: an X window dump, 32 bits a pixel."""
    from PIL import Image

    data = file.read_bytes()
    head = struct.unpack(">25I", data[:100])
    size, width, height, line, colours = head[0], head[4], head[5], head[12], head[19]
    start = size + 12 * colours
    pixels = data[start : start + line * height]
    return Image.frombytes("RGB", (width, height), pixels, "raw", "BGRX", line)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
