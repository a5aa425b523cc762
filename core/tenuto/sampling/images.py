"""Generate images with a pipeline, and save them as PNG."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TenutoError
from ..work import whole_file

TOGETHER = 8  # images generated at once


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
    """`count` images (PIL) of one prompt; image i has the noise of CPU seed `seed + i`."""
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
    """Tensors (N, 3, H, W) in [-1, 1] as PIL images."""
    from PIL import Image

    values = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(value.numpy()) for value in values]


def save_png(
    picture: Any, path: Path, settings: dict[str, Any], parameters: str | None = None
) -> None:
    """Write a PNG whole or not at all, with `settings` as JSON in the text field "tenuto".

    parameters: the text field of that name, in which other programs look for settings.
    """
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("tenuto", json.dumps(settings, ensure_ascii=False))
    if parameters is not None:
        text.add_text("parameters", parameters)
    try:
        with whole_file(path) as part:
            picture.save(part, format="PNG", pnginfo=text)
    except OSError as error:
        raise TenutoError(f"Cannot write {path}: {error.strerror or error}.") from error


def picture_name(prompt: str, seed: int, folder: Path | None = None) -> Path:
    """A file name made of the prompt that is not taken yet, in `folder`, else the current one."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    names = (f"{words}-{seed}{end}.png" for end in ("", *(f"-{n}" for n in range(2, 10_000))))
    return next(path for path in map((folder or Path()).joinpath, names) if not path.exists())
