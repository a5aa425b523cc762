"""A page that opens: nothing of it can be used until what it asked for has come."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import calibrate, calibrate_fields, compare, elsewhere
from .bench import Bench
from .call_fields import shown
from .fields import goes_on
from .lora_field import shown as loras_shown
from .speedup_fields import told
from .viewer import QUIET

LONGEST = 30_000  # milliseconds: then it can be used all the same
READY = "ready"  # .gradio-container[data-tenuto=ready]

CLOSED = """() => {{
  const page = document.querySelector(".gradio-container");
  const open = () => {{ page.inert = false; page.dataset.tenuto = "{ready}"; }};
  window.tenutoAnswered = () => {{ if (--left === 0) open(); }};
  let left = {count};
  page.inert = true;
  setTimeout(open, {longest});
}}"""
ANSWERED = "() => { window.tenutoAnswered(); }"


def wire(
    page: Any, bench: Bench, generation: Any, calibration: Any, comparison: Any, exporting: Any
) -> None:
    """What `page` (gr.Blocks) asks for when it is loaded; until it is answered nothing can be used.

    Else what is typed into fields that an answer may fill is shown but not sent (Gradio 6.31), and
    a late answer would be of the job before the one that was begun meanwhile.
    """
    parts = (generation, calibration, comparison)
    asks = [*_lists(bench, *parts, exporting), *_jobs(bench, calibration, comparison, exporting)]
    asks += _fill(bench, *parts)
    script = CLOSED.format(count=len(asks), ready=READY, longest=LONGEST)
    page.load(None, None, None, js=script, api_visibility="private")
    for ask in asks:
        page.load(**ask).then(None, None, None, js=ANSWERED, api_visibility="private")


def _lists(bench: Bench, *parts: Any) -> list[dict[str, Any]]:
    """The models that there are by now."""
    models = [part.model for part in parts]

    def found() -> list[Any]:
        return [gr.Dropdown(choices=bench.places.models())] * len(models)

    return [{"fn": found, "inputs": None, "outputs": models} | QUIET]


def _jobs(bench: Bench, calibration: Any, comparison: Any, exporting: Any) -> list[dict[str, Any]]:
    """The jobs that run, or ran last, with what they were asked for."""

    def calibrated(key: Any) -> list[Any]:
        job = bench.desk.job(key, "calibrate")
        return [*goes_on(calibrate.seen(bench, job)), *calibrate_fields.filled(bench, job)]

    def compared(key: Any) -> list[Any]:
        job = bench.desk.job(key, "compare")
        return [*goes_on(compare.seen(job)), *compare.filled(bench, job)]

    def exported(key: Any) -> list[Any]:
        return goes_on(elsewhere.seen(bench.desk.job(key, "export")))

    watch, own = calibration.watch, calibration.own
    outputs = [*watch.outputs, *calibration.fields, own.accordion]
    others = [
        *comparison.outputs, *comparison.fields, comparison.own.accordion, comparison.chosen,
    ]  # fmt: skip
    return [
        {"fn": calibrated, "inputs": watch.key, "outputs": outputs} | QUIET,
        {"fn": compared, "inputs": comparison.key, "outputs": others} | QUIET,
        {"fn": exported, "inputs": exporting.key, "outputs": exporting.outputs} | QUIET,
    ]


def _fill(bench: Bench, generation: Any, calibration: Any, comparison: Any) -> list[dict[str, Any]]:
    """What the chosen model takes, and what a speedup would do."""

    def speeds(*values: Any) -> Any:
        return told(bench, *values)

    def taken(name: str) -> Any:
        return shown(bench, name)

    def loras(name: str) -> Any:
        return loras_shown(bench.places, name)

    asks: list[dict[str, Any]] = [
        {"fn": taken, "inputs": part.model, "outputs": part.own.outputs}
        for part in (generation, calibration, comparison)
    ]
    for part in (generation, comparison):
        asks.append({"fn": loras, "inputs": part.model, "outputs": part.loras})
        given = [part.speedup.slider, *part.speeds]
        asks.append({"fn": speeds, "inputs": given, "outputs": part.speedup.outputs})
    return [ask | QUIET for ask in asks]
