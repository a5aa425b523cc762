"""Generate images with a pipeline, and save them as PNG."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TenutoError
from ..files import whole_file
from .pipeline_call import PipelineCall, one_by_one, wanted_prompts
from .results import pil_of, to_images

__all__ = ["generate_images", "image_name", "save_png", "to_images"]

TOGETHER = 8  # images generated at once
FRAME = 125  # milliseconds that a frame of a video is shown


def generate_images(
    pipe: Any,
    prompt: str,
    *,
    negative: str | None,
    steps: int,
    guidance: float | None,
    seed: int,
    count: int,
    call: Mapping[str, Any] | None = None,
) -> list[Any]:
    """`count` images (PIL) of one prompt; image i has the noise of CPU seed `seed + i`.

    call: as in `record`. A video gives all of its frames.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    options = dict(call or {})
    if negative is not None:
        if "negative_prompt" not in known:
            raise TenutoError(f"{type(pipe).__name__} takes no negative prompt.")
        options["negative_prompt"] = negative
    prompts = wanted_prompts(pipe, (prompt,), options)
    asked = PipelineCall(pipe, prompts, steps, guidance, options)
    found: list[Any] = []
    together = 1 if one_by_one(pipe, options) else TOGETHER
    for start in range(seed, seed + count, together):
        size = min(together, seed + count - start)
        for result in asked(asked.denoiser, start, size, "pil", quiet=False):
            found += pil_of(result)
    return found


def save_png(
    image: Any,
    path: Path,
    settings: dict[str, Any],
    parameters: str | None = None,
    more: Sequence[Any] = (),
) -> None:
    """Write a PNG whole or not at all, with `settings` as JSON in the text field "tenuto".

    parameters: the text field of that name, in which other programs look for settings. more: the
    frames that follow on `image`, the first: the PNG moves, `FRAME` milliseconds a frame.
    """
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("tenuto", json.dumps(settings, ensure_ascii=False))
    if parameters is not None:
        text.add_text("parameters", parameters)
    moving: dict[str, Any] = {"save_all": True, "append_images": list(more), "loop": 0}
    options = moving | {"duration": FRAME} if more else {}
    try:
        with whole_file(path) as part:
            image.save(part, format="PNG", pnginfo=text, **options)
    except OSError as error:
        raise TenutoError(f"Cannot write {path}: {error.strerror or error}.") from error


def image_name(prompt: str, seed: int, folder: Path | None = None) -> Path:
    """A file name made of the prompt that is not taken yet, in `folder`, else the current one."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    names = (f"{words}-{seed}{end}.png" for end in ("", *(f"-{n}" for n in range(2, 10_000))))
    return next(path for path in map((folder or Path()).joinpath, names) if not path.exists())
