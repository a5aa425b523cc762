"""`tenuto app`, and where the app is. Gradio is loaded by the app alone."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TenutoError
from .console import Answer, Bars

PACKAGE = "tenuto.gradio_app"
INSTALLED = Path(__file__).resolve().parents[1] / "gradio_app"
CLONE = Path(__file__).resolve().parents[3] / "gradio_app"  # beside core/


def app(
    *,
    port: int | None = None,
    no_browser: bool = False,
    desktop: bool = False,
    roots: Sequence[Path] = (),
    out: Path = Path("tenuto-app"),
    listen: bool = False,
    auth: str | None = None,
    device: str | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Serve the app in a browser or a window, until it is closed; TenutoError if it cannot be."""
    settings = module("settings").Settings.of(
        out=out, roots=roots, port=port, browser=not no_browser, desktop=desktop, listen=listen,
        auth=auth, device=device,
    )  # fmt: skip
    if importlib.util.find_spec("gradio") is None:
        raise TenutoError("The app needs Gradio: pip install 'tenuto[app]'.")
    module("app").serve(settings)
    return Answer("The app is closed.", next=f"what it made is in {out}; tenuto app opens it again")


def module(name: str) -> Any:
    """The app's module `name`: in a clone it is beside core/, in a wheel inside the package."""
    there = not INSTALLED.is_dir() and (CLONE / "__init__.py").is_file()
    if there and PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, CLONE / "__init__.py", submodule_search_locations=[str(CLONE)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = package
        spec.loader.exec_module(package)
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(PACKAGE):
            raise
        raise TenutoError("The app did not come with this installation of Tenuto.") from error
