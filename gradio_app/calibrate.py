"""The tab Calibrate: a view of one calibration, which goes on whether it is looked at or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from tenuto.errors import TenutoError

from .bench import Bench
from .calibrate_fields import asked, calibration_fields
from .call_fields import CallFields
from .check_view import asking
from .fields import artifact_choices, goes_on, noticed
from .jobs import DONE, FAILED, RUNNING, WAITING, Job
from .speedup_fields import forecast_of
from .view import in_line, loss_curve, notice, status, step_map
from .viewer import AUDIBLE, QUIET

IDLE = "Choose a model and how to calibrate it, name the artifact and press Start."
STEADY = 1.0  # seconds between two looks at a job: one takes a page 0.1 s of a processor


@dataclass(frozen=True)
class Watch:
    """The components that show a job."""

    key: gr.BrowserState
    timer: gr.Timer
    status: gr.HTML
    start: gr.Button
    stop: gr.Button
    resume: gr.Button
    discard: gr.Button
    sure: gr.Row
    unfinished: gr.Dropdown
    map: gr.HTML
    loss: gr.HTML
    use: gr.Button
    compare: gr.Button
    export: gr.Button
    download: gr.DownloadButton
    log: gr.DownloadButton
    refused: gr.HTML
    checked: gr.HTML
    before: gr.Column

    @property
    def outputs(self) -> list[Any]:
        """What `seen` fills."""
        return [
            self.timer, self.status, self.start, self.stop, self.resume, self.discard,
            self.sure, self.unfinished, self.map, self.loss, self.use, self.compare, self.export,
            self.download, self.log,
            self.before,
        ]  # fmt: skip


@dataclass(frozen=True)
class Calibrate:
    """The components that the app wires to other tabs."""

    watch: Watch
    model: gr.Dropdown
    fields: list[Any]
    own: CallFields
    check: gr.Button


def tab(bench: Bench, model_name: str) -> Calibrate:
    """The tab's contents."""
    key = gr.BrowserState("", storage_key="tenuto-calibration", secret="tenuto")
    timer = gr.Timer(STEADY, active=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            fields, own = calibration_fields(bench, model_name)
            with gr.Row():
                start = gr.Button("Start", variant="primary", elem_id="calibrate-start")
                stop = gr.Button(
                    "Stop", variant="stop", interactive=False, elem_id="calibrate-stop"
                )
            refused = noticed("calibrate-refused")
            with gr.Group():
                unfinished = gr.Dropdown(
                    bench.places.unfinished(), value=None, label="Unfinished calibrations",
                    elem_id="unfinished",
                )  # fmt: skip
                with gr.Row():
                    resume = gr.Button("Resume", interactive=False, elem_id="calibrate-resume")
                    discard = gr.Button("Discard", interactive=False, elem_id="calibrate-discard")
                sure, yes, no = _sure()
        with gr.Column(scale=3, min_width=320):
            said = gr.HTML(status(None, IDLE), elem_id="calibrate-status")
            with gr.Column() as before:
                checked = gr.HTML(asking(), elem_id="calibrate-checked")
                check = gr.Button("Check again", size="sm", elem_id="calibrate-check")
            with gr.Row():
                use = gr.Button("Use it in Generate", visible=False, elem_id="calibrate-use")
                compare = gr.Button("Compare it", visible=False, elem_id="calibrate-compare")
                export = gr.Button(
                    "Use it in ComfyUI or Forge, export it", visible=False,
                    elem_id="calibrate-export",
                )  # fmt: skip
                download = gr.DownloadButton(
                    "Download the artifact", visible=False, elem_id="calibrate-download"
                )
                log = gr.DownloadButton("Download the log", visible=False)
            shown = gr.HTML(step_map(None), elem_id="calibrate-map")
            loss = gr.HTML("", elem_id="calibrate-loss")
    watch = Watch(
        key, timer, said, start, stop, resume, discard, sure, unfinished, shown, loss, use,
        compare, export, download, log, refused, checked, before,
    )  # fmt: skip
    _wire(bench, watch, fields)
    _wire_discard(bench, watch, yes, no)
    return Calibrate(watch, fields[0], fields, own, check)


def _sure() -> tuple[gr.Row, gr.Button, gr.Button]:
    """The question before something is thrown away, hidden, and its two answers."""
    with gr.Row(visible=False, elem_id="calibrate-sure") as sure:
        gr.HTML("<p>Discard it? What was finished of it is lost.</p>")
        yes = gr.Button("Yes, discard", variant="stop", elem_id="calibrate-sure-yes")
        no = gr.Button("No, keep it", elem_id="calibrate-sure-no")
    return sure, yes, no


def _wire(bench: Bench, watch: Watch, fields: list[Any]) -> None:
    """Buttons, the clock that looks at the job, and the look at it when the page is loaded."""

    def started(begin: Callable[[], Job]) -> list[Any]:
        try:
            job = begin()
            return [job.id, in_line(job)]
        except TenutoError as error:
            return [gr.skip(), notice("It is not started.", str(error))]

    def start(*values: Any) -> list[Any]:
        return started(lambda: bench.calibrate(*asked(bench, *values)))

    def look(key: str) -> list[Any]:
        return seen(bench, bench.desk.job(key, "calibrate"))

    ticked: dict[str, Any] = {"fn": look, "inputs": watch.key, "outputs": watch.outputs} | QUIET
    shown: dict[str, Any] = ticked | {"fn": lambda key: goes_on(look(key))}
    told = [watch.key, watch.refused]
    watch.start.click(start, fields, told, **AUDIBLE).then(**shown)
    watch.resume.click(
        lambda name: started(lambda: bench.resume(name or "")), watch.unfinished, told, **AUDIBLE,
    ).then(**shown)  # fmt: skip
    watch.stop.click(lambda key: bench.stop(key, "calibrate"), watch.key, None, **QUIET).then(
        **shown
    )
    watch.timer.tick(**ticked)
    watch.unfinished.input(
        lambda name: [gr.Button(interactive=bool(name))] * 2, watch.unfinished,
        [watch.resume, watch.discard], **QUIET,
    )  # fmt: skip


def _wire_discard(bench: Bench, watch: Watch, yes: gr.Button, no: gr.Button) -> None:
    """Discard asks first."""

    def discarded(name: str | None) -> str:
        try:
            if name:
                bench.discard(name)
        except TenutoError as error:
            return notice("It is not discarded.", str(error))
        return ""

    def look(key: str) -> list[Any]:
        return goes_on(seen(bench, bench.desk.job(key, "calibrate")))

    watch.discard.click(lambda: gr.Row(visible=True), None, watch.sure, **QUIET)
    no.click(lambda: gr.Row(visible=False), None, watch.sure, **QUIET)
    yes.click(lambda: gr.Row(visible=False), None, watch.sure, **QUIET)
    yes.click(discarded, watch.unfinished, watch.refused, **AUDIBLE).then(
        look, watch.key, watch.outputs, **QUIET
    )


def seen(bench: Bench, job: Job | None) -> list[Any]:
    """The view of a job, in whatever state it is: updates for `Watch.outputs`."""
    alive = job is not None and job.alive
    names = bench.places.unfinished()
    mine = job.request["out"].rpartition("/")[2].removesuffix(".safetensors") if job else ""
    chosen = mine if mine in names else names[0] if names else None
    done = job is not None and job.state == DONE
    found = job.result.get("map", job.map) if job else None
    file = str(bench.places.out / f"{job.result['name']}.safetensors") if job and done else None
    failed = job is not None and job.state == FAILED
    return [
        gr.Timer(active=alive),
        status(job, IDLE),
        gr.Button(interactive=True),
        gr.Button(interactive=job is not None and job.state in (WAITING, RUNNING)),
        gr.Button(interactive=not alive and chosen is not None),
        gr.Button(interactive=not alive and chosen is not None),
        gr.Row(visible=False) if alive else gr.skip(),  # a late look hides no question
        gr.Dropdown(choices=names, value=None if alive else chosen, interactive=not alive),
        step_map(found, done) + (forecast_of(bench, job.result["name"]) if job and done else ""),
        loss_curve(job.loss if job else []),
        *[gr.Button(visible=done)] * 3,
        gr.DownloadButton(value=file, visible=done) if done else gr.DownloadButton(visible=False),
        gr.DownloadButton(value=str(job.log), visible=True)
        if job and failed
        else gr.DownloadButton(visible=False),
        gr.Column(visible=not alive),
    ]


def used(bench: Bench, key: str) -> list[Any]:
    """For the tab Generate: the model and the artifact of a calibration that is done.

    The artifact is not yet among what was seen last: its own settings follow.
    """
    job = bench.desk.job(key, "calibrate")
    if job is None or job.state != DONE:
        return [gr.skip()] * 4
    model, name = job.request["shown_model"], job.result["name"]
    artifact = gr.Dropdown(choices=artifact_choices(bench, model), value=name)
    return [model, artifact, [model, None], gr.Tabs(selected="generate")]
