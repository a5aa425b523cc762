"""Several ways to generate the same images that take turns, so that their times can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError, TenutoError
from ..model import Leave, Signature, watched
from ..progress import Progress
from ..runtime import Latency, percentile, timed
from ..sampling import Sample

ROUNDS = 4  # how often the ways take turns

Way = Callable[[], AbstractContextManager[Any]]  # gives what `sample` is called with
FirstCall = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Generated:
    """What one way generated, by batch: images (n, C, H, W), fp32, in [-1, 1] on the CPU; seconds.

    Each frame of a video is an image.
    """

    batches: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def per_image(self) -> float:
        """Seconds an image, the median over batches."""
        pairs = zip(self.seconds, self.batches, strict=True)
        return percentile([seconds / len(images) for seconds, images in pairs], 50)

    @property
    def latency(self) -> Latency:
        """Seconds of each batch."""
        return Latency(tuple(self.seconds))


def distances(
    distance: Callable[[Tensor, Tensor], Tensor], one: Generated, other: Generated
) -> list[float]:
    """`distance` of each image of `one` from its counterpart, batch by batch: large ones fit."""
    pairs = zip(one.batches, other.batches, strict=True)
    return [value for a, b in pairs for value in distance(a, b).tolist()]


def split(seed: int, count: int, batch: int) -> list[tuple[int, int]]:
    """(first seed, size) of the batches that generate `count` images from `seed` on."""
    return [(s, min(batch, seed + count - s)) for s in range(seed, seed + count, batch)]


def generate_in_turns(
    ways: Mapping[str, Way],
    sample: Sample,
    batches: Sequence[tuple[int, int]],
    on_progress: Progress | None = None,
) -> dict[str, Generated]:
    """Every way generates every batch: some batches each, the next ones in the opposite order.

    ways: what to enter to generate one way; it gives the denoiser that `sample` is called with.
    batches: (seed, size). Only the sampling is timed. TenutoError if `sample` returns no images.
    """
    found = {name: Generated() for name in ways}
    total = len(ways) * sum(size for _, size in batches)
    done = 0
    length = -(-len(batches) // ROUNDS)
    for turn, start in enumerate(range(0, len(batches), length)):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            with ways[name]() as denoiser:
                for seed, size in batches[start : start + length]:
                    if on_progress:
                        on_progress(done, total, name)
                    images, seconds = timed(lambda d=denoiser, s=seed, n=size: sample(d, s, n))
                    found[name].batches.append(_checked(images, size))
                    found[name].seconds.append(seconds)
                    done += size
    if on_progress:
        on_progress(done, total, "generated")
    return found


def _checked(images: Any, size: int) -> Tensor:
    fits = isinstance(images, Tensor) and images.ndim == 4
    if not fits or not len(images) or len(images) % size:  # several: frames of videos
        got = tuple(getattr(images, "shape", ())) or type(images).__name__
        raise TenutoError(f"`sample` should return images ({size}, C, H, W), not {got}.")
    return images.detach().float().clamp(-1, 1).cpu()


def first_call(
    denoiser: nn.Module, sample: Sample, seed: int, batch: int, whole: bool
) -> tuple[FirstCall, int]:
    """The arguments of the first denoiser call of a sampling run, and how many steps were seen.

    The run is left after that call unless `whole`: then the steps are all that it visits.
    """
    calls: list[FirstCall] = []
    times: set[float] = set()
    facts = Signature(denoiser)

    def keep(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            calls.append((args, kwargs))
        times.add(facts.step(facts.inputs(args, kwargs)))
        if not whole:
            raise Leave

    with watched(denoiser, before=keep), suppress(Leave):
        sample(denoiser, seed, batch)
    if not calls:
        raise ModelError("`sample` did not call the denoiser that it was given.")
    return calls[0], len(times)
