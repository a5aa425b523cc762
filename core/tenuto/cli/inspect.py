"""`tenuto inspect`: what an artifact contains, as text, as data and as a plot."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from ..artifact.summary import about, facts_of
from ..errors import TenutoError
from .checks import check_picture, damage_told, load_artifact
from .console import Answer, Bars


def inspect(
    file: Path,
    *,
    plot: Path | Literal[True] | None = None,
    layer: str | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Show what is in an artifact; `plot` (True: beside it) is a PNG of what it says by step."""
    from ..artifact.plots import plot_all
    from ..sampling.images import save_png

    if layer is not None and plot is None:
        raise TenutoError("--layer says whose ranges --plot shows: ask for --plot too.")
    out = None if plot is None else check_picture(plot, file)
    artifact = load_artifact(file)
    size = file.stat().st_size
    with damage_told(file):
        text, data = about(str(file), artifact, size), facts_of(artifact, size)
        if out is None:
            return Answer(text, data, next=f"tenuto inspect {shlex.quote(str(file))} --plot")
        image = plot_all(artifact, file.name, layer)
    save_png(image, out, {"artifact": file.name, "layer": layer})
    text, data = f"{text}\n\nThe plot is in {out}.", data | {"plot": str(out)}
    return Answer(text, data, next=f"tenuto compare MODEL --artifact {shlex.quote(str(file))}")
