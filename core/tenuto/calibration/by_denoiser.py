"""Several denoisers in one pipeline: each is calibrated by itself, one artifact has them all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..artifact import Artifact
from ..model import parts_of
from ..progress import Progress, parts
from ..sampling import Trajectory

Make = Callable[[Path | None, Progress | None], Artifact]  # in a work folder


def recordings(
    model: Any, trajectory: Trajectory, others: Mapping[str, nn.Module] | None = None
) -> dict[str, Trajectory]:
    """The part of a recording of each denoiser of `model`, by the names of `parts_of`.

    others: the denoisers that run beside each. TenutoError if one is not called in it.
    """
    names, called = list(parts_of(model)), {call.denoiser for call in trajectory.calls}
    if len(names) == 1 and len(called) == 1:
        return {"": trajectory}
    beside = others or {}
    return {
        name: trajectory.of(name, {k: v for k, v in beside.items() if k != name}) for name in names
    }


def joined(
    makes: Mapping[str, Make],
    sizes: Mapping[str, int],
    work: str | Path | None,
    on_progress: Progress | None,
) -> Artifact:
    """What is made for each denoiser in turn as one artifact, the main one's, named "", first.

    sizes: what each is worth in the progress. A further one works in a folder inside `work` that
    is called like it.
    """
    folder = None if work is None else Path(work)
    if len(makes) == 1:
        return makes[""](folder, on_progress)
    notes = parts(on_progress, sizes, named=True)
    made = {name: make(folder and folder / name, notes[name]) for name, make in makes.items()}
    whole = made.pop("")
    whole.parts = made
    return whole


def weights_of(model: Any) -> dict[str, int]:
    """How many weights each denoiser has: what it is worth where each weight is visited."""
    return {
        name: sum(p.numel() for p in denoiser.parameters())
        for name, denoiser in parts_of(model).items()
    }


def part_seed(seed: int, part: str) -> int:
    """A seed for each denoiser; the main one's is the user's."""
    return seed_of(seed, part) if part else seed


def seed_of(seed: int, unit: str) -> int:
    """A seed of its own for every unit of work, the same in every run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{unit}".encode()).digest()[:6], "little")
