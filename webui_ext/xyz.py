"""Axes of the X/Y/Z plot: they write attributes of `p`, never the host's options."""

from __future__ import annotations

import sys
from typing import Any

from . import artifacts
from .choices import CACHES, PRECISIONS, SHORT

PREFIX = "[Tenuto] "


def grid() -> Any:
    """The host's script, wherever it has been loaded; None where there is none."""
    from modules import scripts

    for data in scripts.scripts_data:
        if data.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid"):
            return data.module
    return sys.modules.get("scripts.xyz_grid")


def register() -> None:
    """Adds the axes once, however often the page is built."""
    found = grid()
    if found is None or any(o.label.startswith(PREFIX) for o in found.axis_options):
        return

    def axis(label: str, kind: Any, name: str, choices: Any = None) -> Any:
        apply = found.apply_field(f"tenuto_{name}")
        return found.AxisOption(PREFIX + label, kind, apply, choices=choices)

    found.axis_options.extend([
        axis("Enabled", str, "enabled", lambda: ["True", "False"]),
        axis("Artifact", str, "artifact", artifacts.names),
        axis("Precision", str, "precision", lambda: list(PRECISIONS)),
        axis("Cache", str, "cache", lambda: [SHORT[c] for c in CACHES]),
        axis("Speed", float, "speed"),
        axis("Start", float, "start"),
        axis("Speedup", float, "speedup"),
    ])  # fmt: skip
