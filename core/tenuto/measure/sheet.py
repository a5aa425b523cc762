"""Sheets of images: a plain grid, and one with a row a variant and a column a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TenutoError

PAPER, INK, FAINT = (251, 251, 249), (24, 26, 30), (110, 114, 122)
EDGE, GAP, LABEL = 28, 8, 268  # pixels: round the sheet, between images, of the label column


def grid(images: Sequence[Any], gap: int = 2) -> Any:
    """Images of one size side by side, as near to a square as they fit; one stays as it is."""
    from PIL import Image

    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    size = columns * (width + gap) - gap, rows * (height + gap) - gap
    sheet = Image.new("RGB", size, PAPER)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def difference(one: Any, other: Any, gain: int = 8) -> Any:
    """How far two PIL images of one size are apart in each channel, `gain` times enlarged."""
    from PIL import Image, ImageChops

    if one.size != other.size:
        raise TenutoError(f"Images of {one.size} and {other.size} cannot be compared.")
    gaps = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    return Image.eval(gaps, lambda value: min(255, gain * value))


@dataclass(frozen=True)
class Row:
    """One row of a sheet: its name, a few lines about it, and an image for each column."""

    name: str
    lines: Sequence[str]
    images: Sequence[Any]


def sheet(title: str, rows: Sequence[Row], captions: Sequence[str], enlarge: int = 3) -> Any:
    """A labelled sheet: a row a variant, a column a prompt, the prompts under the columns."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = (side * enlarge for side in rows[0].images[0].size)
    big, normal, small = (ImageFont.load_default(size) for size in (24, 20, 15))
    left, top = EDGE + LABEL, EDGE + 46
    foot = 48
    size = (
        left + len(captions) * (width + GAP) - GAP + EDGE,
        top + len(rows) * (height + GAP) + foot + EDGE // 2,
    )
    paper = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(paper)
    pen.text((EDGE, EDGE - 6), title, INK, big)
    for i, row in enumerate(rows):
        y = top + i * (height + GAP)
        pen.text((EDGE, y + 14), row.name, INK, normal)
        for k, line in enumerate(row.lines):
            pen.text((EDGE, y + 46 + 22 * k), line, FAINT, small)
        for k, image in enumerate(row.images):
            large = image.resize((width, height), Image.Resampling.LANCZOS)
            paper.paste(large, (left + k * (width + GAP), y))
    for k, caption in enumerate(captions):
        middle = left + k * (width + GAP) + width // 2
        for n, line in enumerate(_wrapped(caption, small, width)[:2]):
            y = top + len(rows) * (height + GAP) + 6 + 20 * n
            pen.text((middle, y), line, INK, small, anchor="ma")
    return paper


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """`text` in lines that fit `width` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
