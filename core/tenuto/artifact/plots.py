"""One picture of an artifact: its route as a map, the ranges of one layer, the temporal errors.

Each panel is drawn for itself and they are put one under the other, steps along x in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import TenutoError
from .contents import Band, Gaps, StepMap, band, gaps, step_map
from .drawing import (
    EDGE,
    FAINT,
    FOOT,
    HEIGHT,
    INK,
    LABEL,
    LEFT,
    TOP,
    Colour,
    Scale,
    axis,
    column,
    curve,
    filled,
    fit,
    font,
    heading,
    legend,
    panel_width,
    paper,
    points,
    stacked,
)

HELD, OTHER, PALE = (226, 224, 216), (122, 127, 135), (214, 224, 238)
BLUE, RUST, GREEN, VIOLET = (52, 101, 164), (201, 96, 58), (63, 140, 106), (132, 98, 178)
COLOURS: dict[str, Colour] = {
    "attention": BLUE,
    "cross-attention": RUST,
    "feed-forward": GREEN,
    "residual block": VIOLET,
}


def plot(
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    title: str,
    layer: str | None = None,
) -> Any:
    """What an artifact's header and tensors tell by step, as one PIL picture under `title`.

    TenutoError if they tell nothing by step, or nothing of `layer`.
    """
    route, ranges, errors = step_map(header, tensors), band(header, tensors, layer), gaps(header)
    panels = [] if route is None else [map_panel(route)]
    panels += [] if ranges is None else [band_panel(ranges)]
    panels += [] if errors is None else [gaps_panel(errors)]
    if not panels:
        raise TenutoError(
            f"There is nothing to draw in {title}: it has no route, no activation range a step and "
            "no temporal features."
        )
    schedule, guidance = header["schedule"], header["schedule"].get("guidance")
    said = f"{header['model_class']}, {len(schedule['timesteps'])} steps"
    said += "" if guidance is None else f", guidance {float(guidance):g}"
    return stacked([title_panel(title, said, max(p.width for p in panels)), *panels])


def row_height(route: StepMap) -> int:
    """Pixels of a branch: few branches are drawn larger."""
    return max(2, min(18, 600 // len(route.branches)))


def row_tops(route: StepMap) -> list[int]:
    """The upper edge of every branch's row, and the lower one of the last; blocks are apart."""
    blocks, size = route.blocks(), row_height(route)
    gap, y, found = 4 if size > 8 else 2, TOP, []
    for number, block in enumerate(blocks):
        y += gap if number and block != blocks[number - 1] else 0
        found.append(y)
        y += size
    return [*found, y]


def cell(route: StepMap, step: int, top: int) -> tuple[int, int, int, int]:
    """A cell of the row at `top`: left, top, right and bottom pixel of `map_panel`, inclusive."""
    wide, high = column(len(route.timesteps)), row_height(route)
    left = LEFT + step * wide
    return left, top, left + wide - (2 if wide > 5 else 1), top + high - (2 if high > 5 else 1)


def title_panel(title: str, said: str, width: int) -> Any:
    """What the picture is of."""
    image, pen = paper(width, EDGE + 72)
    pen.text((EDGE, EDGE - 6), fit(title, 24, width - 2 * EDGE), INK, font(24))
    pen.text((EDGE, EDGE + 30), fit(said, 15, width - 2 * EDGE), FAINT, font(15))
    return image


def map_panel(route: StepMap) -> Any:
    """Computed cells in the colour of their kind, held ones pale; blocks apart, first on top."""
    tops, kinds = row_tops(route), route.kinds()
    width = panel_width(len(route.timesteps))
    image, pen = paper(width, tops[-1] + FOOT)
    said = f"Route, {route.policy}: {route.held:.1%} of the branch calls are held"
    heading(pen, said, "", width)
    shown = [(kind, COLOURS.get(kind, OTHER)) for kind in dict.fromkeys(kinds)]
    legend(pen, [*shown[:5], ("held", HELD)])
    for kind, top, cells in zip(kinds, tops[:-1], route.table.t().tolist(), strict=True):
        colour = COLOURS.get(kind, OTHER)
        for step, computed in enumerate(cells):
            pen.rectangle(cell(route, step, top), colour if computed else HELD)
    _names(pen, route)
    axis(pen, route.timesteps, tops[-1] + 5)
    return image


def _names(pen: Any, route: StepMap) -> None:
    """Blocks at the left, and the kinds beside their rows where there is room."""
    tops, blocks, last = row_tops(route), route.blocks(), -HEIGHT
    roomy = row_height(route) >= 13
    for number, kind in enumerate(route.kinds()):
        new = number == 0 or blocks[number] != blocks[number - 1]
        if new and tops[number] - last >= 14:
            last = tops[number]
            room = LABEL - (120 if roomy else 20)
            pen.text((EDGE, last), fit(words(blocks[number]), 13, room), INK, font(13))
        if roomy and blocks[number] != route.branches[number]:
            place = LEFT - 10, tops[number]
            pen.text(place, fit(kind, 12, 96), FAINT, font(12), anchor="ra")


def words(block: str) -> str:
    """A block's name as people read it: "transformer_blocks.3" is "block 3"."""
    found: list[str] = []
    for part in block.split("."):
        if part.isdigit() and found:
            found[-1] += f" {part}"
        elif part in ("blocks", "transformer_blocks"):
            found.append("block")
        else:
            found.append(part.removesuffix("_blocks").removesuffix("_block").removesuffix("s"))
    return ", ".join(found[:-1] if len(found) > 1 and found[-1] == "block 0" else found)


def band_panel(ranges: Band) -> Any:
    """The band between the two ends of a range, step by step."""
    steps, low, high = len(ranges.timesteps), ranges.low.tolist(), ranges.high.tolist()
    width = panel_width(steps)
    image, pen = paper(width, TOP + HEIGHT + FOOT)
    heading(pen, f"Input range of {ranges.layer}", ranges.note, width)
    scale = Scale.over([*low, *high])
    upper, lower = points(high, scale), points(low, scale)
    filled(image, upper, lower, PALE)
    scale.draw(pen, steps)
    for line in (upper, lower):
        curve(image, line, BLUE)
    axis(pen, ranges.timesteps, TOP + HEIGHT + 12)
    return image


def gaps_panel(errors: Gaps) -> Any:
    """The temporal errors step by step, on a scale of powers of ten."""
    steps, mean, worst = len(errors.timesteps), errors.mean.tolist(), errors.worst.tolist()
    width = panel_width(steps)
    image, pen = paper(width, TOP + HEIGHT + FOOT)
    heading(pen, f"Temporal features of {errors.note}: 1 - cosine to full precision", "", width)
    lines = [("mean of the modules", mean, BLUE), ("worst module", worst, RUST)]
    lines = lines[:1] if mean == worst else lines
    if len(lines) > 1:
        legend(pen, [(name, colour) for name, _, colour in lines])
    scale = Scale.over([*mean, *worst], log=True)
    scale.draw(pen, steps)
    for _, values, colour in reversed(lines):
        curve(image, points(values, scale), colour)
    axis(pen, errors.timesteps, TOP + HEIGHT + 12)
    return image
