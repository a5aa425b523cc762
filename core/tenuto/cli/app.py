"""`tenuto app`: its options, and where the app is. Gradio is loaded by the app alone."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..errors import TenutoError
from .arguments import whole

PACKAGE = "tenuto.gradio_app"
INSTALLED = Path(__file__).resolve().parents[1] / "gradio_app"
CLONE = Path(__file__).resolve().parents[3] / "gradio_app"  # beside core/


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `tenuto app`."""
    add = parser.add_argument
    add("--port", type=whole(1), metavar="N", help="port (the first free one from 7860 on)")
    add("--no-browser", action="store_true", help="open no browser, only say where the app is")
    add("--desktop", action="store_true", help="a window of its own instead of the browser")
    add(
        "--roots",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders in which models in diffusers format are; none outside them is opened",
    )
    add(
        "--out",
        type=Path,
        default=Path("tenuto-app"),
        metavar="DIR",
        help="folder for all that the app writes (%(default)s)",
    )
    add("--listen", action="store_true", help="let other machines in; takes --auth")
    add("--auth", metavar="USER:PASSWORD", help="ask who comes for this name and password")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... (a GPU where there is one)")


def launch(args: argparse.Namespace) -> None:
    """Serve the app with these options until it is closed; TenutoError if it cannot be."""
    settings = module("settings").Settings.of(args)
    if importlib.util.find_spec("gradio") is None:
        raise TenutoError("The app needs Gradio: pip install 'tenuto[app]'.")
    module("app").serve(settings)


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
