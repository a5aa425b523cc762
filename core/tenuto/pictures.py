"""Pictures as files: drawn with a pipeline, laid out in a grid or a labelled sheet, saved."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import TenutoError

TOGETHER = 8  # pictures drawn at once
PAPER, INK, FAINT = (251, 251, 249), (24, 26, 30), (110, 114, 122)
EDGE, GAP, LABEL = 28, 8, 268  # pixels: round the sheet, between pictures, of the label column


def draw(
    pipe: Any,
    prompt: str,
    *,
    negative: str | None,
    steps: int,
    guidance: float | None,
    seed: int,
    count: int,
) -> list[Any]:
    """`count` pictures (PIL) of one prompt; picture i has the noise of CPU seed `seed + i`."""
    known = inspect.signature(type(pipe).__call__).parameters
    options: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
    options = {name: value for name, value in options.items() if name in known}
    if guidance is not None:
        options["guidance_scale"] = guidance
    if negative is not None and "negative_prompt" not in known:
        raise TenutoError(f"{type(pipe).__name__} takes no negative prompt.")
    found: list[Any] = []
    for start in range(seed, seed + count, TOGETHER):
        seeds = range(start, min(start + TOGETHER, seed + count))
        if negative is not None:
            options["negative_prompt"] = [negative] * len(seeds)
        found += pipe(
            prompt=[prompt] * len(seeds),
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
            **options,
        ).images
    return found


def to_images(pictures: Tensor) -> list[Any]:
    """Tensors (N, 3, H, W) in [-1, 1] as PIL pictures."""
    from PIL import Image

    values = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(value.numpy()) for value in values]


def grid(pictures: Sequence[Any], gap: int = 2) -> Any:
    """Pictures of one size side by side, as near to a square as they fit; one stays as it is."""
    from PIL import Image

    if len(pictures) == 1:
        return pictures[0]
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    size = columns * (width + gap) - gap, rows * (height + gap) - gap
    sheet = Image.new("RGB", size, PAPER)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(picture, (column * (width + gap), row * (height + gap)))
    return sheet


def difference(one: Any, other: Any, gain: int = 8) -> Any:
    """How far two PIL pictures of one size are apart in each channel, `gain` times enlarged."""
    from PIL import Image, ImageChops

    if one.size != other.size:
        raise TenutoError(f"Pictures of {one.size} and {other.size} cannot be compared.")
    gaps = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    return Image.eval(gaps, lambda value: min(255, gain * value))


def save_png(
    picture: Any, path: Path, settings: dict[str, Any], parameters: str | None = None
) -> None:
    """Write a PNG whole or not at all, with `settings` as JSON in the text field "tenuto".

    parameters: the text field of that name, in which other programs look for settings.
    """
    import os

    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("tenuto", json.dumps(settings, ensure_ascii=False))
    if parameters is not None:
        text.add_text("parameters", parameters)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(part, format="PNG", pnginfo=text)
        part.replace(path)
    except OSError as error:
        raise TenutoError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)


def picture_name(prompt: str, seed: int, folder: Path | None = None) -> Path:
    """A file name made of the prompt that is not taken yet, in `folder`, else the current one."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    names = (f"{words}-{seed}{end}.png" for end in ("", *(f"-{n}" for n in range(2, 10_000))))
    return next(path for path in map((folder or Path()).joinpath, names) if not path.exists())


@dataclass(frozen=True)
class Row:
    """One row of a sheet: its name, a few lines about it, and a picture for each column."""

    name: str
    lines: Sequence[str]
    pictures: Sequence[Any]


def sheet(title: str, rows: Sequence[Row], captions: Sequence[str], enlarge: int = 3) -> Any:
    """A labelled sheet: a row a variant, a column a prompt, the prompts under the columns."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = (side * enlarge for side in rows[0].pictures[0].size)
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
        for k, picture in enumerate(row.pictures):
            large = picture.resize((width, height), Image.Resampling.LANCZOS)
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
