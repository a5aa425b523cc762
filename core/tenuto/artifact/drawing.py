"""What the panels of a plot are drawn with: paper, words, the axis of steps, scales and curves.

A panel has a label column at its left and T columns of steps beside it; all sizes are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PAPER, INK, FAINT = (251, 251, 249), (24, 26, 30), (110, 114, 122)
EDGE = 28  # pixels round the whole
Colour = tuple[int, int, int]
Point = tuple[float, float]

LINE: Colour = (222, 221, 215)
LABEL, WIDTH, NARROW, HEIGHT = 236, 800, 880, 150  # label column, plot, least panel, curves
LEFT = EDGE + LABEL
TOP, FOOT = 64, 76  # of a panel, above and below its plot
SMOOTH = 4  # curves are drawn this many times larger, then reduced


def font(size: int) -> Any:
    """The one typeface, which Pillow brings."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def fit(text: str, size: int, width: int) -> str:
    """`text` on one line of at most `width` pixels, its middle left out where it is longer."""
    text, face = " ".join(text.split()), font(size)
    keep = min(len(text), width)
    while keep > 4 and face.getlength(_cut(text, keep)) > width:
        keep -= 1
    return _cut(text, keep)


def _cut(text: str, keep: int) -> str:
    return text if keep >= len(text) else f"{text[: keep // 2]}...{text[len(text) - keep // 2 :]}"


def paper(width: int, height: int) -> tuple[Any, Any]:
    """An empty picture and the pen for it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def column(steps: int) -> int:
    """Pixels of one step: few steps are drawn wider."""
    return max(1, min(80, WIDTH // max(1, steps)))


def panel_width(steps: int) -> int:
    """Pixels of a panel with so many steps."""
    return max(NARROW, LEFT + steps * column(steps) + EDGE)


def heading(pen: Any, title: str, note: str, width: int) -> None:
    """The two lines on top of a panel."""
    pen.text((EDGE, 0), fit(title, 18, width - 2 * EDGE), INK, font(18))
    if note:
        pen.text((LEFT, 30), fit(note, 14, width - LEFT - EDGE), FAINT, font(14))


def legend(pen: Any, names: Sequence[tuple[str, Colour]], x: int = LEFT, y: int = 31) -> None:
    """Colours and what they stand for, in one line."""
    for name, colour in names:
        pen.rectangle((x, y, x + 13, y + 13), colour)
        text = fit(name, 14, 150)
        pen.text((x + 20, y - 1), text, FAINT, font(14))
        x += 20 + round(font(14).getlength(text)) + 22


def axis(pen: Any, timesteps: Sequence[float], y: int) -> None:
    """Numbers of the steps (from 1) and their timesteps below `y`, as many as there is room for."""
    wide, face = column(len(timesteps)), font(13)
    form = ".0f" if max(map(abs, timesteps)) >= 20 else ".3g"
    rows = [
        ("step", INK, [f"{i + 1}" for i in range(len(timesteps))]),
        ("timestep", FAINT, [f"{t:{form}}" for t in timesteps]),
    ]
    room = max(face.getlength(text) for _, _, texts in rows for text in texts) + 8
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 4096) if n * wide >= room)
    for row, (name, colour, texts) in enumerate(rows):
        pen.text((LEFT - 22, y + 18 * row), name, FAINT, face, anchor="ra")
        for place in range(0, len(texts), every):
            x = LEFT + place * wide + wide // 2
            pen.text((x, y + 18 * row), texts[place], colour, face, anchor="ma")


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` over HEIGHT pixels below TOP; exponents of ten if `log`."""

    low: float
    high: float
    log: bool = False

    @staticmethod
    def over(values: Sequence[float], log: bool = False) -> Scale:
        """The scale that holds all values with some room; with `log`, whole powers of ten."""
        low, high = min(values), max(values)
        if log:
            low, high = (math.log10(max(v, 1e-16)) for v in (low, high))
            return Scale(math.floor(low), max(math.ceil(high), math.floor(low) + 1), True)
        room = max(high - low, abs(high) * 1e-6, 1e-30) * 0.06
        return Scale(low - room, high + room)

    def y(self, value: float) -> float:
        """Where a value is, in pixels."""
        value = math.log10(max(value, 1e-16)) if self.log else value
        return TOP + HEIGHT * (self.high - value) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """A few round values and how they are written."""
        if self.log:
            every = max(1, math.ceil((self.high - self.low) / 5))
            powers = range(int(self.low), int(self.high) + 1, every)
            return [(10.0**p, "1" if p == 0 else f"1e{p}") for p in powers]
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [(n * step, f"{n * step:.6g}") for n in range(first, last + 1)]

    def draw(self, pen: Any, steps: int) -> None:
        """Lines across the plot, and their values in the label column."""
        right = LEFT + steps * column(steps) - 1
        for value, text in self.ticks():
            y = round(self.y(value))
            pen.line((LEFT, y, right, y), LINE)
            pen.text((LEFT - 10, y), text, FAINT, font(13), anchor="rm")


def points(values: Sequence[float], scale: Scale) -> list[Point]:
    """The middles of the steps at the heights of their values."""
    wide = column(len(values))
    return [(LEFT + i * wide + wide / 2, scale.y(v)) for i, v in enumerate(values)]


def curve(image: Any, line: Sequence[Point], colour: Colour) -> None:
    """A smooth line through `line`, with a dot at each point where there is room for one."""
    mask, pen = _large(image)
    large = [(x * SMOOTH, y * SMOOTH) for x, y in line]
    pen.line(large, 255, 2 * SMOOTH, joint="curve")
    size = 3 * SMOOTH if len(line) <= 60 else 0
    for x, y in large if size else ():
        pen.ellipse((x - size, y - size, x + size, y + size), 255)
    _through(image, mask, colour)


def filled(image: Any, upper: Sequence[Point], lower: Sequence[Point], colour: Colour) -> None:
    """The area between two lines."""
    mask, pen = _large(image)
    pen.polygon([(x * SMOOTH, y * SMOOTH) for x, y in (*upper, *reversed(lower))], 255)
    _through(image, mask, colour)


def _large(image: Any) -> tuple[Any, Any]:
    from PIL import Image, ImageDraw

    mask = Image.new("L", (image.width * SMOOTH, image.height * SMOOTH))
    return mask, ImageDraw.Draw(mask)


def _through(image: Any, mask: Any, colour: Colour) -> None:
    image.paste(colour, (0, 0), mask.reduce(SMOOTH))


def stacked(panels: Sequence[Any]) -> Any:
    """Pictures one under the other."""
    image, _ = paper(max(p.width for p in panels), sum(p.height for p in panels))
    y = 0
    for panel in panels:
        image.paste(panel, (0, y))
        y += panel.height
    return image
