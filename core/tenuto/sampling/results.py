"""What a pipeline returned, whatever it calls it: latents, images, the frames of a video, sound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TenutoError


def main_of(result: Any) -> Any:
    """The first thing in what a pipeline returned: `.images`, `.frames`, `.audios`, a tuple."""
    if isinstance(result, Tensor | list):
        return result
    try:
        return result[0]  # diffusers' outputs are dicts that count their fields too
    except (LookupError, TypeError):
        return result


def latents_of(results: Sequence[Any]) -> Tensor:
    """Final latents (B, ...), of one or more calls with output type "latent"."""
    found = [main_of(result) for result in results]
    parts = [torch.stack(list(x)) if _is_tensors(x) else x for x in found]
    parts = [torch.as_tensor(x) if hasattr(x, "__array__") else x for x in parts]
    if not _is_tensors(parts):
        raise TenutoError(
            f"There are no latents in what the pipeline returns: {type(found[0]).__name__}."
        )
    return torch.cat(parts)


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, Tensor) for x in value)


def images_of(results: Sequence[Any]) -> Tensor:
    """Images (N, C, H, W), fp32 in [-1, 1]; each frame of a video is one. TenutoError: none."""
    found = [image for result in results for image in _images(main_of(result))]
    return torch.cat(found)


def pil_of(result: Any) -> list[Any]:
    """The same as PIL images."""
    value = main_of(result)
    flat = list(_flat(value)) if isinstance(value, list) else []
    if flat and all(hasattr(x, "getbands") for x in flat):
        return flat
    return to_images(images_of([result]))


def to_images(images: Tensor) -> list[Any]:
    """Tensors (N, 3, H, W) in [-1, 1] as PIL images."""
    from PIL import Image

    values = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(value.numpy()) for value in values]


def _flat(value: list[Any]) -> Iterator[Any]:
    for item in value:
        yield from _flat(item) if isinstance(item, list) else [item]


def _images(value: Any, listed: bool = False) -> Iterator[Tensor]:
    """Images (n, C, H, W) in [-1, 1] in what a pipeline calls "pt", "np" or "pil"."""
    least = 3 if listed else 4  # of dimensions: a batch of sound has three
    if isinstance(value, list | tuple):
        for item in value:
            yield from _images(item, listed=True)
    elif hasattr(value, "getbands"):  # PIL
        yield _as_rows(torch.as_tensor(_array(value)).movedim(-1, -3).float()) / 127.5 - 1
    elif isinstance(value, Tensor) and least <= value.ndim <= 5:
        yield _as_rows(value.float()) * 2 - 1
    elif hasattr(value, "__array__") and least <= value.ndim <= 5:
        yield _as_rows(torch.as_tensor(value).movedim(-1, -3).float()) * 2 - 1
    else:
        shape = getattr(value, "shape", type(value).__name__)
        raise TenutoError(f"There are no images in what the pipeline returns: {shape}.")


def _array(image: Any) -> Any:
    import numpy

    return numpy.array(image.convert("RGB"))


def _as_rows(x: Tensor) -> Tensor:
    """(C, H, W), (B, C, H, W) or (B, F, C, H, W) as (n, C, H, W)."""
    return x[None] if x.ndim == 3 else x.flatten(0, -4)
