"""The tab Export: how an artifact is used in other programs, and files that need no Tenuto."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tenuto.errors import TenutoError
from tenuto.sampling.loading import PREFIX

from .answers import filling, same_model, seen_last
from .bench import Bench
from .calibrate import STEADY
from .exports import AS_IT_IS, FORMS, HOSTS, NO_HOST, begun
from .fields import goes_on, noticed
from .jobs import DONE, FAILED, RUNNING, WAITING, Job
from .view import card, in_line, notice, status
from .viewer import AUDIBLE, CHOICE, QUIET

IDLE = "Choose what it is for and press Export. The artifact itself needs no export."


@dataclass(frozen=True)
class Export:
    """The components that the app wires to other tabs."""

    key: gr.BrowserState
    model: gr.Dropdown
    artifact: gr.Dropdown
    chosen: gr.JSON  # the model that was seen last
    outputs: list[Any]


def tab(bench: Bench, model_name: str) -> Export:
    """The tab's contents."""
    key = gr.BrowserState("", storage_key="tenuto-export", secret="tenuto")
    timer = gr.Timer(STEADY, active=False)
    choices = bench.places.artifacts(model_name)
    first = choices[0] if choices else None
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown(
                bench.places.models(), value=model_name, label="Model", allow_custom_value=True,
                elem_id="export-model",
            )  # fmt: skip
            artifact = gr.Dropdown(
                choices, value=first, label="Artifact", allow_custom_value=True,
                elem_id="export-artifact",
            )  # fmt: skip
            to = gr.Radio(
                [(said, name) for name, said in FORMS.items()], value=AS_IT_IS, label="What for",
                elem_id="export-to",
            )  # fmt: skip
            with gr.Row():
                go = gr.Button(
                    "Export", variant="primary", interactive=False, elem_id="export-start"
                )
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="export-stop")
            refused = noticed("export-refused")
        with gr.Column(scale=3, min_width=320):
            how = gr.HTML(how_to(bench, model_name, first), elem_id="export-how")
            said = gr.HTML(status(None, IDLE), elem_id="export-status")
            file = gr.DownloadButton("Download the file", visible=False, elem_id="export-file")
            log = gr.DownloadButton("Download the log", visible=False)
    seen = seen_last(model_name)
    made = Export(key, model, artifact, seen, [timer, said, go, stop, file, log])
    _wire(bench, made, (to, how, refused))
    return made


def _wire(bench: Bench, made: Export, parts: tuple[Any, ...]) -> None:
    to, how, refused = parts
    timer, _, go, stop, *_ = made.outputs

    def look(key: Any, to: str) -> list[Any]:
        return seen(bench.desk.job(key, "export"), to)

    def start(*values: Any) -> list[Any]:
        try:
            job = begun(bench, *values)
            return [job.id, in_line(job)]
        except TenutoError as error:
            return [gr.skip(), notice("It is not exported.", str(error))]

    def model_chosen(name: str, before: Any) -> list[Any]:
        if same_model(before, name):  # it was only looked at
            return [gr.skip(), gr.skip()]
        found = bench.places.artifacts(name)
        return [gr.Dropdown(choices=found, value=found[0] if found else None), [name]]

    asked = [made.model, made.artifact, to]
    ticked: dict[str, Any] = {"fn": look, "inputs": [made.key, to], "outputs": made.outputs}
    shown: dict[str, Any] = ticked | {"fn": lambda *now: goes_on(look(*now))} | QUIET
    go.click(start, asked, [made.key, refused], **AUDIBLE).then(**shown)
    stop.click(lambda key: bench.stop(key, "export"), made.key, None, **QUIET).then(**shown)
    timer.tick(**ticked | QUIET)
    to.input(**shown)
    filling(
        made.model.change, model_chosen, [made.model, made.chosen], [made.artifact, made.chosen],
        [made.artifact, go], chosen=True, **CHOICE,
    )  # fmt: skip
    for part in (made.model, made.artifact):
        part.change(lambda *now: how_to(bench, *now), [made.model, made.artifact], how, **QUIET)


def seen(job: Job | None, to: str = AS_IT_IS) -> list[Any]:
    """The view of an export, in whatever state it is: updates for `Export.outputs`."""
    alive, done = job is not None and job.alive, job is not None and job.state == DONE
    file = Path(job.result["out"]) if job and done else None
    failed = job is not None and job.state == FAILED
    return [
        gr.Timer(active=alive),
        status(job, IDLE),
        gr.Button(interactive=to != AS_IT_IS),
        gr.Button(interactive=job is not None and job.state in (WAITING, RUNNING)),
        gr.DownloadButton(value=str(file), visible=True)
        if file is not None and file.is_file()
        else gr.DownloadButton(visible=False),
        gr.DownloadButton(value=str(job.log), visible=True)
        if job and failed
        else gr.DownloadButton(visible=False),
    ]


def how_to(bench: Bench, model: Any, artifact: Any) -> str:
    """What to do with the artifact itself, host by host."""
    try:
        file = bench.places.artifact(artifact or "")
    except TenutoError:
        said = "Calibrate a model, or add an artifact in Generate."
        return card("idle", "There is no artifact yet.", said)
    demo = str(model).startswith(PREFIX)
    rows = HOSTS[-1:] if demo else HOSTS
    texts = [NO_HOST] if demo else []
    lines = "".join(f"<p>{escape(text)}</p>" for text in texts) + "".join(
        f"<p><strong>{escape(title)}.</strong> {escape(text.format(file=file, name=str(file)))}</p>"
        for title, text in rows
    )
    return card("done", "The artifact as it is:", file.name, lines)


def chosen(bench: Bench, key: Any) -> list[Any]:
    """What was seen, the model of a calibration that is done, this tab, and the artifact."""
    job = bench.desk.job(key, "calibrate")
    if job is None or job.state != DONE:
        return [gr.skip()] * 4
    model, name = job.request["shown_model"], job.result["name"]
    artifact = gr.Dropdown(choices=bench.places.artifacts(model), value=name)
    return [[model], model, gr.Tabs(selected="export"), artifact]
