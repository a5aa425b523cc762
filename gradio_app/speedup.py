"""A speedup before the run: how many calls it computes, and what the forecast is likely to cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tenuto.errors import TenutoError

MOST = 4.0  # of the slider; the API takes more
SAFE = 3e-4  # a predicted error that is suggested: about half a hundred dB
AT_ONE = 13.5  # dB of an error of 1
KEPT = 16  # artifacts and lengths of runs whose predictions are remembered
SEEN = (
    (48.0, "no difference that one sees"), (42.0, "differences that one has to look for"),
    (36.0, "small differences that one sees"), (30.0, "clear differences"),
)  # fmt: skip
WORST = "another image of the same prompt"
NO_FORECAST = "has no forecast, so no call can be skipped: calibrate again to have one."
NO_ARTIFACT = "A speedup skips calls by the forecast of an artifact: choose one."


@dataclass(frozen=True, eq=False)
class Known:
    """What an artifact says of its forecast; kernel None: it has none.

    default: the speedup that is used where nobody says one. route: it has a cache schedule too.
    measured: PSNR in dB by the number of calls skipped, in a run of as many steps as the kernel.
    """

    kernel: Any
    default: float | None = None
    route: bool = False
    measured: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outlook:
    """A run at a speedup. errors: predicted, by the number of computed calls; {}: none is skipped.

    why: one sentence on why nothing can be skipped, where that is so.
    """

    steps: int
    calls: int
    errors: dict[int, float] = field(default_factory=dict)
    measured: dict[int, float] = field(default_factory=dict)
    why: str = ""
    route: bool = False

    @property
    def db(self) -> float | None:
        """About which PSNR is predicted; None where every call is computed."""
        return decibels(self.errors[self.calls]) if self.calls < self.steps else None

    @property
    def safe(self) -> int:
        """The fewest calls whose predicted error is not seen."""
        return min((c for c, error in self.errors.items() if error <= SAFE), default=self.steps)


def decibels(error: float) -> float:
    """About which PSNR of images goes with a predicted error; at most 100."""
    return min(100.0, AT_ONE - 10 * math.log10(max(error, 1e-30)))


def in_words(db: float) -> str:
    """What one sees of so many dB."""
    return next((words for least, words in SEEN if db >= least), WORST)


def known(file: Path) -> Known:
    """What the artifact in `file` says, read from its header and one small tensor; remembered."""
    try:
        about = file.stat()
    except OSError as error:
        raise TenutoError(f"Cannot read {file.name}: {error.strerror or error}.") from error
    return _known(file, about.st_mtime_ns, about.st_size)


@lru_cache(KEPT)
def _known(file: Path, changed: int, size: int) -> Known:
    from tenuto.artifact import Artifact, kernel_of
    from tenuto.artifact.header import opened
    from tenuto.cli.checks import damage_told

    with damage_told(file), opened(file) as (header, tensors):
        names = [name for name in tensors.keys() if name.startswith("forecast/")]  # noqa: SIM118
        made = Artifact(header, {name: tensors.get_tensor(name) for name in names})
        facts = header.get("forecast") or {}
        scores = facts.get("measured", {}).get("scores", [])
        default = facts.get("default")
        return Known(
            kernel_of(made),
            None if default is None else float(default),
            bool(header.get("route")),
            {int(row["skipped"]): float(row["psnr_db"]) for row in scores},
        )


@lru_cache(KEPT)
def _errors(of: Known, steps: int) -> dict[int, float]:
    """The predicted error of a run by the number of its computed calls, every call included.

    Its timesteps are taken to lie as those of the recorded run do.
    """
    from tenuto.caching import Programme

    times = of.kernel.timesteps
    if steps != len(times):
        gap = (len(times) - 1) / (steps - 1)
        low = [min(int(i * gap), len(times) - 2) for i in range(steps)]
        times = [
            times[n] + (i * gap - n) * (times[n + 1] - times[n]) for i, n in enumerate(low)
        ]  # fmt: skip
    return {**Programme(of.kernel.at(times)).errors, steps: 0.0}


def outlook(of: Known, steps: int, speedup: float, scheduler: Any = None) -> Outlook:
    """A run of `steps` steps with what an artifact says of its forecast.

    scheduler: the model's, where it is known.
    """
    from tenuto.caching import MOST, SHORTEST
    from tenuto.sampling.noise import is_stochastic

    why, kernel = "", of.kernel
    if kernel is None:
        why = f"This artifact {NO_FORECAST}"
    elif scheduler is not None and is_stochastic(scheduler):
        why = "The model's sampler adds noise of its own at every step, so no call can be skipped."
    elif not SHORTEST <= steps <= MOST:
        why = f"Calls are skipped in runs of {SHORTEST} to {MOST} steps."
    if kernel is None or why:
        return Outlook(steps, steps, why=why, route=of.route)
    errors = _errors(of, steps)
    calls = min(steps, max(int(steps / speedup + 1e-6), min(errors)))
    measured = of.measured if steps == len(kernel.timesteps) else {}
    return Outlook(steps, calls, errors, measured, route=of.route)


def asked(files: Iterable[tuple[str, Path]], speedup: float | None) -> float | None:
    """What `attach` is told for a speedup; TenutoError where an artifact cannot have it.

    files: names and files of artifacts. None and 1 leave cache schedules as they are; 1 switches
    off what an artifact would skip by itself.
    """
    if speedup is None:
        return None
    every = [(name, known(file)) for name, file in files]
    if speedup > 1 and not every:
        raise TenutoError(NO_ARTIFACT)
    for name, found in every:
        if speedup > 1 and found.kernel is None:
            raise TenutoError(f"{name} {NO_FORECAST}")
    off = not any(found.default is not None for _, found in every)
    return None if speedup == 1 and off else speedup
