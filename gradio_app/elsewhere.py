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
from .exports import (
    AS_IT_IS,
    ENDINGS,
    FORMS,
    HOW,
    NEEDS,
    NO_ARTIFACT,
    NO_EXPORT,
    NO_HOST,
    WHERE,
    begun,
    exported,
)
from .fields import goes_on, noticed
from .jobs import DONE, FAILED, RUNNING, WAITING, Job
from .samples import attached
from .samples import exported as in_diffusers
from .view import card, in_line, notice, status
from .viewer import AUDIBLE, CHOICE, QUIET

IDLE = "Choose a format and press Export."


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
            text, code, why, _ = how_to(bench, model_name, first, AS_IT_IS)
            why = gr.HTML(why, elem_id="export-why", elem_classes="tenuto-notice")
            refused = noticed("export-refused")
        with gr.Column(scale=3, min_width=320):
            how = gr.HTML(text, elem_id="export-how")
            python = gr.Textbox(
                code, label="In Python", lines=4, max_lines=20, interactive=False,
                visible=bool(code), buttons=["copy"], elem_id="export-code",
            )  # fmt: skip
            said = gr.HTML(status(None, IDLE), elem_id="export-status")
            file = gr.DownloadButton("Download the file", visible=False, elem_id="export-file")
            log = gr.DownloadButton("Download the log", visible=False)
    seen = seen_last(model_name)
    made = Export(key, model, artifact, seen, [timer, said, stop, file, log])
    _wire(bench, made, (to, refused, [how, python, why, go]))
    return made


def _wire(bench: Bench, made: Export, parts: tuple[Any, ...]) -> None:
    to, refused, told = parts
    timer, _, stop, *_ = made.outputs
    go = told[-1]

    def look(key: Any) -> list[Any]:
        return seen(bench.desk.job(key, "export"))

    def explained(*values: Any) -> list[Any]:
        how, code, why, ready = how_to(bench, *values)
        return [how, gr.Textbox(code, visible=bool(code)), why, gr.Button(interactive=ready)]

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
    ticked: dict[str, Any] = {"fn": look, "inputs": made.key, "outputs": made.outputs}
    shown: dict[str, Any] = ticked | {"fn": lambda *now: goes_on(look(*now))} | QUIET
    go.click(start, asked, [made.key, refused], **AUDIBLE).then(**shown)
    stop.click(lambda key: bench.stop(key, "export"), made.key, None, **QUIET).then(**shown)
    timer.tick(**ticked | QUIET)
    filling(
        made.model.change, model_chosen, [made.model, made.chosen], [made.artifact, made.chosen],
        [made.artifact, go], chosen=True, **CHOICE,
    )  # fmt: skip
    for part in asked:
        part.change(explained, asked, told, **QUIET)


def seen(job: Job | None) -> list[Any]:
    """The view of an export, in whatever state it is: updates for `Export.outputs`."""
    alive, done = job is not None and job.alive, job is not None and job.state == DONE
    file = Path(job.result["out"]) if job and done else None
    failed = job is not None and job.state == FAILED
    return [
        gr.Timer(active=alive),
        status(job, IDLE),
        gr.Button(interactive=job is not None and job.state in (WAITING, RUNNING)),
        gr.DownloadButton(value=str(file), visible=True)
        if file is not None and file.is_file()
        else gr.DownloadButton(visible=False),
        gr.DownloadButton(value=str(job.log), visible=True)
        if job and failed
        else gr.DownloadButton(visible=False),
    ]


def how_to(bench: Bench, model: Any, artifact: Any, to: Any) -> tuple[str, str, str, bool]:
    """What is done with an artifact in the form `to`, of `FORMS`.

    Returns the text, Python that does it or nothing, why there is nothing to export or nothing,
    and whether there is something.
    """
    try:
        file = bench.places.artifact(artifact or "")
    except TenutoError:
        none = card("idle", *NO_ARTIFACT)
        return none, "", none, False
    to = to if to in ENDINGS else AS_IT_IS
    itself = to == AS_IT_IS
    out = file if itself else exported(bench, artifact, to)
    try:
        code = (
            attached(bench, model, file)
            if itself
            else in_diffusers(bench, model, file, to, out)
        )  # fmt: skip
    except TenutoError:  # there is no such model, or the artifact is of another
        code = ""
    demo = str(model).startswith(PREFIX)
    rows = {"Where": WHERE[itself].format(f"<code>{escape(str(out))}</code>")}
    rows |= {"In other programs": NO_HOST} if demo and to != "diffusers" else HOW[to]
    rows |= {"In Python": NEEDS[to]} if code else {}
    text = "".join(
        f"<p><strong>{escape(title)}.</strong> {said}</p>" for title, said in rows.items()
    )
    title = "The artifact as it is:" if itself else "What Export writes:"
    how = card("done" if itself else "idle", title, out.name, text)
    return how, code, card("idle", "Export is off.", NO_EXPORT) if itself else "", not itself


def chosen(bench: Bench, key: Any) -> list[Any]:
    """What was seen, the model of a calibration that is done, this tab, and the artifact."""
    job = bench.desk.job(key, "calibrate")
    if job is None or job.state != DONE:
        return [gr.skip()] * 4
    model, name = job.request["shown_model"], job.result["name"]
    artifact = gr.Dropdown(choices=bench.places.artifacts(model), value=name)
    return [[model], model, gr.Tabs(selected="export"), artifact]
