"""A1111, Forge and reForge entry: they load every file of an extension's scripts/ folder.

The library and the package of the extension come from the clone itself, whatever its folder is
called, and are kept under names of their own: nothing is installed.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "tenuto_webui"


def _load():
    """The extension's package; one that is loaded already stays, with what it has attached."""
    if "tenuto" not in sys.modules:
        sys.path.insert(0, str(ROOT / "core"))  # holds one name; the host takes it off again
        importlib.import_module("tenuto")
    if PACKAGE not in sys.modules:
        folder = ROOT / "webui_ext"
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module(f"{PACKAGE}.extension")


if importlib.util.find_spec("modules") is not None:  # inside of a host
    TenutoScript = _load().register()
