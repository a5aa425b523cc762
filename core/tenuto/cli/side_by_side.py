"""The sheet of `tenuto compare --sheet`: images with and without, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..measure import ARTIFACT, FULL, Comparison
from ..measure.sheet import Row, difference, sheet
from ..sampling.images import save_png, to_images
from .demo import conditions, row_lines, unchanged

MOST = 8  # images on the sheet
WIDTH = 384, 512  # pixels of an image there: at least about, at most
GAIN = 8


def save_sheet(
    out: Path,
    title: str,
    changed: str,
    found: Comparison,
    generated: Any,
    prompts: Sequence[str],
    seed: int,
) -> None:
    """Write the first images of a comparison as a PNG, at most `MOST`; of a video a frame each.

    title, changed: what the sheet and its second row are called. generated: by `compare_all`, with
    `FULL` and `ARTIFACT`. prompts: of the images in turn, nothing where the pipeline takes none.
    seed: of the first one.
    """
    images = dict[str, list[Any]]()
    for name in (FULL, ARTIFACT):
        every = torch.cat(generated[name].batches)
        frames = max(1, len(every) // found.count)
        images[name] = [_small(image) for image in to_images(every[::frames][:MOST])]
    pairs = zip(images[FULL], images[ARTIFACT], strict=True)
    gaps = [difference(one, other, GAIN) for one, other in pairs]
    rows = [
        Row("Full precision", row_lines(FULL, unchanged(found)), images[FULL]),
        Row(changed, row_lines(ARTIFACT, found), images[ARTIFACT]),
        Row("Difference", [f"{GAIN} times enlarged"], gaps),
    ]
    count = len(images[FULL])
    captions = [prompts[(seed + i) % len(prompts)] if prompts else "" for i in range(count)]
    paper = sheet(f"{title}: {conditions(found)}", rows, captions, _enlarge(images[FULL][0]))
    settings = {"model": title, "prompts": captions, "seed": seed, "steps": found.steps}
    save_png(paper, out, settings | {"guidance": found.guidance})


def _small(image: Any) -> Any:
    image.thumbnail((WIDTH[1], WIDTH[1]))
    return image


def _enlarge(image: Any) -> int:
    """So that small images can be looked at: 64 pixels as 192, as the demo has them."""
    return max(1, min(3, WIDTH[0] // max(image.size)))
