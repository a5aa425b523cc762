"""An artifact as one image: cache schedule, activation ranges of a layer, temporal errors.

It is matplotlib's object API alone: no pyplot, so that nothing global is read or changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import TenutoError
from ..text import printable
from .artifact import Artifact
from .contents import StepMap, band, curve, gaps, step_map
from .panels import (
    EDGE,
    FAINT,
    INK,
    LEFT,
    PAPER,
    Panel,
    across,
    band_panel,
    curve_panel,
    fit,
    gaps_panel,
    map_panel,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 144
HEAD, TOP, FOOT, RIGHT = 54, 46, 42, 20  # points: title; above and below a panel; right of it


def plot(
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    title: str,
    layer: str | None = None,
) -> Any:
    """What an artifact's header and tensors say by step, as a PIL image with this title.

    layer: whose activation ranges; else those that change most. TenutoError if there is nothing by
    step, or nothing of `layer`, or if matplotlib is not installed.
    """
    return image(figure(header, tensors, title, layer))


def plot_all(artifact: Artifact, title: str, layer: str | None = None) -> Any:
    """`plot` of an artifact, and below it of each part that has something by step.

    layer: of a part, if "NAME/" is in front of it: then the part is shown alone.
    """
    name, _, inner = (layer or "").rpartition("/")
    shown = {"": artifact, **artifact.parts}
    if name in artifact.parts:
        shown, layer = {name: artifact.parts[name]}, inner
    elif layer is not None:
        shown = {"": artifact}
    found, refused = [], None
    for part, own in shown.items():
        said = f"{title}, {printable(part)}" if part else title
        try:
            found.append(plot(own.header, own.tensors, said, layer))
        except TenutoError as error:
            refused = refused or error
    if refused is not None and not found:
        raise refused
    return _stacked(found)


def _stacked(images: Sequence[Any]) -> Any:
    """Images one below the other."""
    from PIL import Image

    if len(images) == 1:
        return images[0]
    size = max(image.width for image in images), sum(image.height for image in images)
    whole, y = Image.new("RGB", size, PAPER), 0
    for image in images:
        whole.paste(image, (0, y))
        y += image.height
    return whole


def figure(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], title: str, layer: str | None = None
) -> Figure:
    """`plot` as matplotlib's figure."""
    route, ranges, errors = step_map(header, tensors), band(header, tensors, layer), gaps(header)
    panels: list[Panel] = [] if route is None else [map_panel(route)]
    panels += [] if ranges is None else [band_panel(ranges)]
    panels += [] if errors is None else [gaps_panel(errors)]
    budget = curve(header, tensors)
    panels += [] if budget is None else [curve_panel(budget)]
    if not panels:
        raise TenutoError(
            f"There is nothing to plot in {title}: it has no cache schedule, no activation range "
            "per step, no temporal features and no forecast."
        )
    schedule, guidance = header["schedule"], header["schedule"].get("guidance")
    said = f"{header['model_class']}, {len(schedule['timesteps'])} steps"
    said += "" if guidance is None else f", guidance {float(guidance):g}"
    counts = [len(facts.timesteps) for facts in (route, ranges, errors) if facts is not None]
    steps = max([*counts, 0 if budget is None else budget.steps])
    return _composed(title, said, panels, steps)


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def map_figure(route: StepMap, title: str, said: str) -> Figure:
    """The map of one cache schedule below a title and a line; TenutoError without matplotlib."""
    return _composed(title, said, [map_panel(route)], len(route.timesteps))


def image(figure: Figure) -> Any:
    """A figure as a PIL image."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _composed(title: str, said: str, panels: Sequence[Panel], steps: int) -> Figure:
    """Title and panels, one below the other, wide enough for so many steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TenutoError("A plot needs matplotlib: pip install 'tenuto[plot]'.") from error
    wide = across(steps)
    width = LEFT + wide + RIGHT
    y = height = HEAD + sum(TOP + high + FOOT for high, _ in panels)
    found = Figure((width / 72, height / 72), DPI, facecolor=PAPER)
    for text, size, colour, down in ((title, 15, INK, 26), (said, 9.5, FAINT, 43)):
        place = EDGE / width, (y - down) / height
        found.text(*place, fit(text, 64), size=size, color=colour, parse_math=False)
    y -= HEAD
    for high, fill in panels:
        y -= TOP + high
        axes = found.add_axes((LEFT / width, y / height, wide / width, high / height))
        axes.set_facecolor(PAPER)
        axes.tick_params(length=0, labelsize=8, labelcolor=FAINT)
        axes.spines[:].set_visible(False)
        fill(axes)
        y -= FOOT
    return found
