"""The slider "Speedup" of a tab, and beside it what it would do, in words and as a curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tenuto.caching import DEFAULT_FORECAST, predicted
from tenuto.errors import TenutoError

from .answers import filling
from .bench import Bench
from .curve import curve
from .given import given, whole
from .places import SHIPPED
from .requests import STEPS
from .speedup import (
    MOST,
    Outlook,
    automatic,
    forecast_for,
    in_words,
    known,
    outlook,
    scheduler,
)
from .studio import defaults_of
from .view import counted
from .viewer import QUIET

OFF = 1.0
UNSEEN = "no difference that one sees is predicted."
ARTIFACT_OFF = "Off, as the artifact is: every call is computed."
LATEST: dict[str, Any] = QUIET | {"queue": True, "trigger_mode": "always_last"}  # of a drag


@dataclass(frozen=True)
class SpeedupFields:
    """The slider, the button that sets it to what is predicted unseen, and what is said of it."""

    slider: gr.Slider
    auto: gr.Button
    said: gr.HTML

    @property
    def outputs(self) -> list[Any]:
        """What `told` fills."""
        return [self.slider, self.said]


def speedup_fields(name: str) -> SpeedupFields:
    """The components, to be filled by `told`."""
    slider = gr.Slider(
        OFF, MOST, OFF, step=0.1, label="Speedup",
        info="Denoiser calls that are skipped: 2 skips half of them, 1 none",
        elem_id=f"{name}-speedup",
    )  # fmt: skip
    auto = gr.Button("Speedup: auto", size="sm", elem_id=f"{name}-speedup-auto")
    return SpeedupFields(slider, auto, gr.HTML("", elem_id=f"{name}-speedup-said"))


def follow(bench: Bench, made: SpeedupFields, inputs: list[Any]) -> None:
    """Say anew what the slider would do when it is moved, and when anything else changes.

    inputs: components of the model, the artifacts (one or several), the steps, and perhaps whether
    artifacts are on.
    """

    def now(value: Any, *others: Any) -> list[Any]:
        return told(bench, value, *others)

    for part in inputs:
        part.change(now, [made.slider, *inputs], made.outputs, **LATEST)
    made.slider.change(lambda *values: now(*values)[1], [made.slider, *inputs], made.said, **LATEST)
    filling(
        made.auto.click, lambda *values: safest(bench, *values), inputs, made.slider,
        [made.slider], **QUIET,
    )  # fmt: skip


def default_for(bench: Bench, artifacts: Any) -> float:
    """Where the slider begins with these artifacts."""
    try:
        found = (known(bench.places.artifact(name)).default for name in _named(artifacts))
        return next((min(value, MOST) for value in found if value is not None), OFF)
    except TenutoError:
        return OFF


def usable(bench: Bench, model: str, artifacts: Any, value: Any, on: bool = True) -> Any:
    """What the slider says, or that nothing is skipped: where there is no forecast.

    on: whether artifacts are; off is off, also for the forecast that ships.
    """
    try:
        folder, files = bench.places.model(model), [*_files(bench, artifacts).values()]
        if files and not on:
            return OFF
        able = (forecast_for(folder, file).kernel is not None for file in files or [None])
        return value if all(able) else OFF
    except TenutoError:
        return OFF


def safest(bench: Bench, model: str, artifacts: Any, steps: Any, on: bool = True) -> Any:
    """Where "auto" puts the slider; it stays where nothing is known."""
    try:
        files = _files(bench, artifacts).values()
        if files and not on:
            return gr.skip()
        count = given(steps, whole, *STEPS)
        found = automatic(bench.places.model(model), files, count)
    except TenutoError:
        return gr.skip()
    return min(MOST, int(10 * found + 1e-6) / 10)  # in steps of the slider, never more than safe


def told(
    bench: Bench, value: Any, model: str, artifacts: Any, steps: Any, on: bool = True
) -> list[Any]:
    """Updates for `SpeedupFields.outputs`: whether the slider can be moved, and what it would do.

    artifacts: a name, or a list of them; without one, calls are skipped by the forecast that ships.
    on: as in `usable`.
    steps: None or "" are those of the first artifact.
    """
    fixed = gr.Slider(interactive=False)  # its value stays: other fields may just be filled in
    try:
        files: dict[str, Path | None] = {**_files(bench, artifacts)}
        if files and not on:
            return [fixed, _line(ARTIFACT_OFF)]
        files = files or {DEFAULT_FORECAST: None}
        folder = bench.places.model(model)
        count = given(steps, whole, *STEPS)
        if count is None:
            count = defaults_of(folder, next(iter(files.values()))).steps
        speedup, sampler = float(value or OFF), scheduler(folder)
        found = {
            name: outlook(
                forecast_for(folder, file), count, speedup, sampler,
                route=file is not None and known(file).route,
            )
            for name, file in files.items()
        }  # fmt: skip
    except TenutoError as error:
        return [fixed, _line(str(error))]
    able = all(not seen.why for seen in found.values())
    return [gr.Slider(interactive=True) if able else fixed, shown(found)]


def forecast_of(bench: Bench, name: str) -> str:
    """What an artifact's forecast would do in a run as it was recorded; "" where it has none."""
    try:
        made = known(bench.places.artifact(name))
        if made.kernel is None:
            return ""
        seen = outlook(made, len(made.kernel.timesteps), OFF)
    except TenutoError:
        return ""
    if seen.why:
        return ""
    said = f"{seen.steps - seen.safe} of {seen.steps} calls can be skipped: {UNSEEN}"
    return f"<p><strong>Forecast:</strong> {said}</p>{curve(seen)}"


def shown(found: dict[str, Outlook]) -> str:
    """What is to be expected of one artifact or of several, and the curve of the first."""
    if len(found) == 1:
        (seen,) = found.values()
        return _line(seen.why) if seen.why else f"{_sentence(seen)}{curve(seen)}"
    lines = "".join(
        f"<p><strong>{escape(name.removeprefix(SHIPPED))}</strong>: {_words(seen)}</p>"
        for name, seen in found.items()
    )
    first = next((seen for seen in found.values() if seen.errors), None)
    return f'<div class="tenuto-outlook">{lines}</div>{curve(first) if first else ""}'


def _line(sentence: str) -> str:
    return f'<p class="tenuto-small">{escape(sentence)}</p>'


def _sentence(seen: Outlook) -> str:
    facts = f'data-calls="{seen.calls}" data-steps="{seen.steps}"'
    return f'<div class="tenuto-outlook" {facts}><p>{_words(seen)}</p></div>'


def _words(seen: Outlook) -> str:
    """One or two sentences on a run."""
    if seen.why:
        return escape(seen.why)
    steps, db = seen.steps, seen.db
    if db is None:
        said = f"Off: each of the {steps} calls is computed."
        if seen.safe < steps:
            safe = int(10 * steps / seen.safe) / 10
            said += f" At {safe:g}, {seen.safe} would be computed and the others forecast: {UNSEEN}"
        return said
    said = (
        f"<strong>{seen.calls} of {counted(steps, 'call', 'calls')} computed</strong>, the others "
        f"forecast. {predicted(db, seen.foreign)} That is, {in_words(db)}."
    )
    measured = seen.measured.get(steps - seen.calls)
    said += "" if measured is None else f" Measured at calibration: {measured:.1f} dB."
    return said + (" Its cache schedule is left out meanwhile." if seen.route else "")


def _files(bench: Bench, artifacts: Any) -> dict[str, Path]:
    """The files of the artifacts that are chosen, by name; TenutoError where one is not there."""
    return {name: bench.places.artifact(name) for name in _named(artifacts)}


def _named(artifacts: Any) -> Sequence[str]:
    """The names that are chosen."""
    found = [artifacts] if isinstance(artifacts, str) else artifacts
    found = found if isinstance(found, list | tuple) else ()
    return [name for name in found if isinstance(name, str) and name]
