"""What ships: the version, demo models, prompts, the network of LPIPS; modules of a package."""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path
from types import ModuleType

from .errors import TenutoError
from .text import prompts_of

__version__ = "0.1.0"  # also in pyproject.toml: a test holds the two together

HERE = Path(__file__).resolve().parent
PLACES = (HERE / "assets", HERE.parents[1] / "assets")  # installed; a clone or editable install


def asset(name: str) -> Path:
    """The shipped file or folder `name`, such as "lpips-alex.safetensors".

    Raises TenutoError if it is not there.
    """
    found = next((place / name for place in PLACES if (place / name).exists()), None)
    if found is None:
        raise TenutoError(f"{name} should have come with Tenuto and is missing: install it again.")
    return found


def cache_folder() -> Path:
    """The user's folder for what can be made again; not made here."""
    windows = os.name == "nt"
    given = os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME", "")
    usual = Path.home() / ("AppData/Local" if windows else ".cache")
    return (Path(given) if Path(given).is_absolute() else usual) / "tenuto"


def prompts(name: str = "default") -> tuple[str, ...]:
    """The lines of the shipped prompt list `prompts/NAME.txt`."""
    return tuple(prompts_of(asset(f"prompts/{name}.txt").read_text(encoding="utf-8")))


def found(package: str) -> dict[str, ModuleType]:
    """Every module of a package, by the name of its file, in the order of these names.

    package: its full name. Nothing is remembered between calls: a file that was written, or a
    folder that was put on the package's `__path__`, a moment ago is found.
    """
    importlib.invalidate_caches()
    names = sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__))
    return {name: importlib.import_module(f"{package}.{name}") for name in names}


def classes(package: str) -> dict[str, type]:
    """The classes with a `name` of their own in the modules of a package, by that name.

    A name that is only inherited does not count.
    """
    return {
        str(vars(value)["name"]): value
        for module in found(package).values()
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and isinstance(vars(value).get("name"), str)
    }
