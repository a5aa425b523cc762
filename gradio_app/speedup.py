"""A speedup before the run: how many calls it computes, and what the forecast is likely to cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tenuto.caching import AT_ONE, AUTO, Speedup, about_db, calls_for
from tenuto.errors import TenutoError

from .given import given, real
from .studio import defaults_of

MOST = 4.0  # of the slider
LARGEST = 200  # that the API takes
KEPT = 16  # artifacts and lengths of runs whose predictions are remembered
SEEN = (
    (48.0, "no difference that one sees"), (42.0, "differences that one has to look for"),
    (36.0, "small differences that one sees"), (30.0, "clear differences"),
)  # fmt: skip
WORST = "another image of the same prompt"
NO_SCHEDULER = "What noise this model has at a step is not known before it is loaded."
SEVERAL = "The forecast that ships is for models of one denoiser: this one has several."


@dataclass(frozen=True, eq=False)
class Known:
    """What an artifact says of its forecast, or the one that ships; kernel None: there is none.

    default: the speedup that is used where nobody says one. route: whether the artifact has a cache
    schedule. measured: PSNR in dB by the number of calls skipped, in a run of as many steps as the
    kernel. at_one: the PSNR of a predicted error of 1. scheduler: the model's, where the kernel is
    not. why: one sentence on why there is no kernel.
    """

    kernel: Any
    default: float | None = None
    route: bool = False
    measured: dict[int, float] = field(default_factory=dict)
    at_one: float = AT_ONE
    scheduler: Any = None
    why: str = ""


@dataclass(frozen=True)
class Outlook:
    """A run at a speedup. errors: predicted, by the number of computed calls; {}: none is skipped.

    why: one sentence on why nothing can be skipped, where that is so. foreign: whether the forecast
    is not of this model.
    """

    steps: int
    calls: int
    errors: dict[int, float] = field(default_factory=dict)
    measured: dict[int, float] = field(default_factory=dict)
    why: str = ""
    route: bool = False
    at_one: float = AT_ONE
    foreign: bool = False

    @property
    def db(self) -> float | None:
        """About which PSNR is predicted; None where every call is computed."""
        return self.decibels(self.calls) if self.calls < self.steps else None

    @property
    def safe(self) -> int:
        """The fewest calls whose predicted error is not seen."""
        return calls_for(self.errors, self.steps, AUTO)

    def decibels(self, calls: int) -> float:
        """About which PSNR is predicted where so many calls are computed."""
        return about_db(self.errors[calls], self.at_one)


def in_words(db: float) -> str:
    """What one sees of so many dB."""
    return next((words for least, words in SEEN if round(db) >= least), WORST)


def known(file: Path) -> Known:
    """What the artifact in `file` says, read from its header and one small tensor; remembered."""
    try:
        about = file.stat()
    except OSError as error:
        raise TenutoError(f"Cannot read {file.name}: {error.strerror or error}.") from error
    return _known(file, about.st_mtime_ns, about.st_size)


@lru_cache(KEPT)
def _known(file: Path, changed: int, size: int) -> Known:
    from tenuto.artifact import Artifact, at_one, kernel_of, scores_of
    from tenuto.artifact.header import opened
    from tenuto.cli.checks import damage_told

    with damage_told(file), opened(file) as (header, tensors):
        names = [name for name in tensors.keys() if name.startswith("forecast/")]  # noqa: SIM118
        made = Artifact(header, {name: tensors.get_tensor(name) for name in names})
        kernel, facts = kernel_of(made), header.get("forecast") or {}
        default = facts.get("default")
        return Known(
            kernel,
            None if default is None else float(default),
            bool(header.get("route")),
            {skipped: db for skipped, (db, _) in scores_of(facts).items()},
            at_one(facts),
        )


def shipped(model: str) -> Known:
    """The forecast that ships, for the model of this folder or name; remembered."""
    from tenuto.sampling.skeleton import denoisers_in

    found = scheduler(model)
    if found is None or denoisers_in(model) > 1:
        return Known(None, why=NO_SCHEDULER if found is None else SEVERAL)
    return _shipped(found)


@lru_cache(KEPT)
def _shipped(found: Any) -> Known:
    """The same, for a scheduler."""
    from tenuto.caching import default_kernel
    from tenuto.sampling import noises_at, prediction_of

    try:
        kernel = default_kernel(prediction_of(found), partial(noises_at, found))
    except TenutoError as error:
        return Known(None, why=str(error))
    if kernel.noise((999.0, 0.0)) is None:
        return Known(None, why=NO_SCHEDULER)
    return Known(kernel, scheduler=found)


def scheduler(model: str) -> Any:
    """The scheduler of a model, which is not loaded for it; None where it is not known.

    Remembered while the files that say what it is are the same.
    """
    from tenuto.sampling.loading import folder_of

    folder = folder_of(model)
    if folder is None:
        return None
    files = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    with suppress(LookupError):  # what was not found is looked for again
        return _scheduler(model, *(_changed(file) for file in files))
    return None


@lru_cache(KEPT)
def _scheduler(model: str, *_: Any) -> Any:
    """The same; LookupError where it is not known."""
    from tenuto.sampling.skeleton import scheduler_of

    found = scheduler_of(model)
    if found is None:
        raise LookupError(model)
    return found


def _changed(file: Path) -> tuple[int, int] | None:
    """What differs when a file was written anew; None where there is none."""
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size


def forecast_for(model: str, file: Path | None) -> Known:
    """The forecast of an artifact, or the one that ships where it has none."""
    own = None if file is None else known(file)
    return shipped(model) if own is None or own.kernel is None else own


@lru_cache(KEPT)
def _errors(kernel: Any, scheduler: Any, steps: int) -> dict[int, float]:
    """The predicted error of a run by the number of its computed calls, every call included.

    Its timesteps are taken to lie as those of the recorded run do, or as the scheduler has them.
    """
    from tenuto.caching import Programme

    if scheduler is not None:
        return {**Programme(kernel.at(_times(scheduler, steps))).errors, steps: 0.0}
    times = kernel.timesteps
    if steps != len(times):
        gap = (len(times) - 1) / (steps - 1)
        low = [min(int(i * gap), len(times) - 2) for i in range(steps)]
        times = [
            times[n] + (i * gap - n) * (times[n + 1] - times[n]) for i, n in enumerate(low)
        ]  # fmt: skip
    return {**Programme(kernel.at(times)).errors, steps: 0.0}


def _times(made: Any, steps: int) -> tuple[float, ...]:
    """Where a scheduler goes in so many steps; evenly where it wants to know more for that."""
    from tenuto.sampling import visited_once

    made, config = copy.deepcopy(made), made.config
    most = float(getattr(config, "num_train_timesteps", 1000))
    shifted = getattr(config, "use_dynamic_shifting", False)
    with suppress(Exception):  # as each scheduler has its own
        made.set_timesteps(steps, **({"mu": config.max_shift} if shifted else {}))
        found = visited_once(made.timesteps.tolist())
        if len(found) == steps:
            return found
    return tuple(most * (1 - step / steps) for step in range(steps))


def outlook(
    of: Known, steps: int, speedup: Speedup, sampler: Any = None, route: bool = False
) -> Outlook:
    """A run of `steps` steps with a forecast.

    sampler: the model's scheduler, where it is known. route: whether a cache schedule is left out.
    """
    from tenuto.caching import MOST, SHORTEST
    from tenuto.sampling.noise import is_stochastic

    why, kernel = of.why, of.kernel
    if kernel is None:
        pass
    elif sampler is not None and is_stochastic(sampler):
        why = "The model's sampler adds noise of its own at every step, so no call can be skipped."
    elif not SHORTEST <= steps <= MOST:
        why = f"Calls are skipped in runs of {SHORTEST} to {MOST} steps."
    if kernel is None or why:
        return Outlook(steps, steps, why=why, route=route)
    errors = _errors(kernel, of.scheduler, steps)
    calls = calls_for(errors, steps, speedup)
    measured = of.measured if steps == len(kernel.timesteps) else {}
    return Outlook(
        steps, calls, errors, measured, route=route, at_one=of.at_one,
        foreign=of.scheduler is not None,
    )  # fmt: skip


def automatic(model: str, files: Iterable[Path], steps: int | None) -> float:
    """The largest speedup that is predicted unseen, of one artifact or of all of several; 1: none.

    steps: None are those of the first artifact, or of the model.
    """
    every = [*files] or [None]
    count = defaults_of(model, every[0]).steps if steps is None else steps
    found = [outlook(forecast_for(model, f), count, 1, scheduler(model)) for f in every]
    return math.floor(1e4 * count / max(seen.safe for seen in found)) / 1e4  # never a call less


def asked(model: str, files: Iterable[Path], speedup: Any) -> Speedup | None:
    """The speedup that `attach` gets: a number or "auto"; None: nobody asked for one.

    files: of artifacts; without any, calls are skipped by the forecast that ships. None and 1 leave
    cache schedules as they are; 1 switches off what an artifact would skip by itself. "auto" is
    left to the run, which knows its timesteps. TenutoError for what is neither, and where nothing
    can be skipped as there is no forecast.
    """
    paths = [*files]
    auto = speedup == AUTO
    value = AUTO if auto else given(speedup, real, "The speedup", 1, LARGEST)
    if value is None:
        return None
    if value == 1:
        return 1 if any(known(file).default is not None for file in paths) else None
    for file in paths or [None]:
        found = forecast_for(model, file)
        if found.kernel is None:
            raise TenutoError(found.why)
    return value
