"""Renders the images of docs/app.md again: every tab, light and dark, at work.

    python tests/app/screenshots.py        takes about five minutes

The one of the window is from `tests/app/desktop.py docs/app-window.jpg`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
WIDTH, HEIGHT, LARGEST = 1180, 900, 150_000
LOOKS = ("light", "dark")
READY = ".gradio-container[data-tenuto=ready]"  # the page can be used


def from_image(folder: Path) -> Path:
    """A copy of the shipped U-Net model whose pipeline starts from an image."""
    copy = folder / "models" / "unet-from-image"
    shutil.copytree(ROOT / "assets" / "demo-unet", copy)
    index = copy / "model_index.json"
    facts = json.loads(index.read_text("utf-8"))
    index.write_text(json.dumps(facts | {"_class_name": "StableDiffusionImg2ImgPipeline"}), "utf-8")
    return copy


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The app's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tenuto.cli", "app", "--no-browser", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "core")}
    command += ["--out", "demo", "--roots", str(from_image(folder).parent)]
    process = subprocess.Popen(command, cwd=folder, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def kept(page: Any, name: str) -> None:
    """The whole page as a JPEG of less than 150 kB."""
    from PIL import Image

    page.mouse.move(0, 0)
    page.wait_for_timeout(700)
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    for share, quality in ((1, 85), (1, 75), (1, 65), (1, 55), (0.8, 65), (0.7, 65), (0.6, 65)):
        size = round(image.width * share), round(image.height * share)
        file = io.BytesIO()
        image.resize(size).save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() < LARGEST:
            break
    (DOCS / f"app-{name}.jpg").write_bytes(file.getvalue())
    print(f"app-{name}.jpg: {image.width} x {image.height}, {file.tell() // 1000} kB", flush=True)


def show(page: Any, name: str) -> None:
    """Choose a tab."""
    page.get_by_role("tab", name=name).click()
    page.wait_for_timeout(400)


def generate(pages: dict[str, Any]) -> None:
    """The first image, as it comes."""
    for look, page in pages.items():
        page.fill("#prompt textarea", "a monarch butterfly" if look == "dark" else "a goldfish")
        page.click("#generate")
        page.wait_for_selector("#generate-slider img", timeout=120_000)
        page.wait_for_selector("#numbers table")
        kept(page, f"generate-{look}")


def speedup(pages: dict[str, Any]) -> None:
    """With half of the calls skipped by the forecast of the artifact that it begins with."""
    page = pages["light"]
    page.fill("#generate-speedup input[type=number]", "2")
    page.keyboard.press("Tab")
    page.wait_for_selector("#generate-speedup-said [data-calls='10']", timeout=120_000)
    page.click("#generate")
    page.wait_for_function(
        "document.querySelector('#infotext textarea')?.value.includes('speedup: 2')",
        timeout=120_000,
    )
    kept(page, "speedup-light")
    page.reload()
    page.wait_for_selector(READY)


def call(pages: dict[str, Any], folder: Path) -> None:
    """The pipeline's own settings: another image from the first one."""
    image = min((folder / "demo" / "pictures").glob("a-goldfish*.png"))
    for look, page in pages.items():
        page.fill("#prompt textarea", "a lemon")
        page.click("#model input")
        page.get_by_role("option", name="unet-from-image").click()
        page.get_by_text("The pipeline's own settings").locator("visible=true").click()
        page.wait_for_selector("#generate-image-from")
        page.set_input_files("#generate-image-from input[type=file]", image)
        page.wait_for_selector("#generate-image-from img")
        page.fill("#generate-more textarea", "strength = 0.7")
        page.click("#generate")
        page.wait_for_selector("#generate-image img", timeout=120_000)
        kept(page, f"call-{look}")
        page.reload()
        page.wait_for_selector(READY)


def calibrate(pages: dict[str, Any]) -> None:
    """While the router trains, and when it is done."""
    page, other = pages["light"], pages["dark"]
    for each in pages.values():
        show(each, "Calibrate")
    page.fill("#calibrate-name input, #calibrate-name textarea", "my-artifact")
    page.get_by_text("All options").locator("visible=true").click()
    page.fill("#calibrate-iterations input, #calibrate-iterations textarea", "4")
    page.get_by_text("All options").locator("visible=true").click()
    page.wait_for_selector("#calibrate-checked [data-state=done]", timeout=120_000)
    kept(page, "check-light")
    page.click("#calibrate-start")
    page.wait_for_selector("#calibrate-loss circle", timeout=600_000)
    page.wait_for_function(
        "document.querySelectorAll('#calibrate-loss td').length >= 6", timeout=600_000
    )
    kept(page, "calibrate-light")
    page.wait_for_selector("#calibrate-status [data-state=done]", timeout=600_000)
    other.reload()
    other.wait_for_selector(READY)
    show(other, "Calibrate")
    other.wait_for_selector("#calibrate-status [data-state=done]")
    kept(other, "calibrate-dark")


def choose(page: Any) -> None:
    """The tab Compare, with the artifact that was just made beside the one that it begins with."""
    show(page, "Compare")
    page.locator("#compare-artifacts input").fill("my-artifact")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")


def compare(pages: dict[str, Any]) -> None:
    """The artifact that was just made, and the one that ships."""
    page, other = pages["light"], pages["dark"]
    choose(page)
    page.click("#compare-start")
    page.wait_for_selector("#compare-slider img", timeout=600_000)
    kept(page, "compare-light")
    other.reload()
    other.wait_for_selector(READY)
    choose(other)  # a page that is opened anew shows the last comparison, but not its fields
    other.wait_for_selector("#compare-slider img")
    other.get_by_role("radio", name="Difference").locator("visible=true").click()
    kept(other, "compare-dark")


def export(page: Any) -> None:
    """The artifact that was just made, as a file that ComfyUI reads by itself."""
    show(page, "Export")
    page.locator("#export-artifact input").fill("my-artifact")
    page.keyboard.press("Enter")
    page.get_by_role("radio", name="A model file for ComfyUI").click()
    page.click("#export-start")
    page.wait_for_selector("#export-status [data-state=done]", timeout=600_000)
    kept(page, "export-light")


def main() -> None:
    """All of them."""
    from playwright.sync_api import sync_playwright

    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder)) as url,
        sync_playwright() as play,
    ):
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        pages = {}
        for look in LOOKS:
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(f"{url}/?__theme={look}")
            page.wait_for_selector(READY)
            pages[look] = page
        generate(pages)
        speedup(pages)
        call(pages, Path(folder))
        calibrate(pages)
        compare(pages)
        export(pages["light"])
        browser.close()


if __name__ == "__main__":
    main()
