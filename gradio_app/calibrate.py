"""The tab Calibrate: a view of one calibration, which goes on whether it is looked at or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from tenuto.calibration import PRESETS, WIDTHS, algorithms
from tenuto.errors import TenutoError

from .bench import Bench
from .generate import artifact_choices
from .jobs import DONE, FAILED, Job
from .view import loss_curve, status, step_map
from .viewer import AUDIBLE, QUIET, optional

IDLE = "Choose a model and what becomes of it, name the artifact and press Start."
SCHEMES = [
    ("W8A8: 8-bit weights and inputs", "w8a8"), ("W4A8: 4-bit weights, 8-bit inputs", "w4a8"),
    ("W8A16: 8-bit weights only", "w8a16"), ("W4A16: 4-bit weights only", "w4a16"),
    ("none: the denoiser keeps its weights", ""),
]  # fmt: skip
ENCODERS = [("Leave as they are", ""), *((f"{width[1:]} bits", width) for width in WIDTHS)]
EFFORTS = {
    "quick": "quick: a few minutes for a small model", "standard": "standard: four times the data",
    "thorough": "thorough: for the final file",
}  # fmt: skip
STEADY = 0.5  # seconds between two looks at a job


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
    download: gr.DownloadButton
    log: gr.DownloadButton

    @property
    def outputs(self) -> list[Any]:
        """What `seen` fills."""
        return [
            self.timer, self.status, self.start, self.stop, self.resume, self.discard,
            self.sure, self.unfinished, self.map, self.loss, self.use, self.download, self.log,
        ]  # fmt: skip


@dataclass(frozen=True)
class Calibrate:
    """The components that the app wires to other tabs. after: the artifact's name and its model."""

    watch: Watch
    model: gr.Dropdown
    fields: list[Any]


def tab(bench: Bench, model_name: str) -> Calibrate:
    """The tab's contents."""
    key = gr.BrowserState("", storage_key="tenuto-calibration", secret="tenuto")
    timer = gr.Timer(STEADY, active=False)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            fields = _fields(bench, model_name)
            with gr.Row():
                start = gr.Button("Start", variant="primary", elem_id="calibrate-start")
                stop = gr.Button(
                    "Stop", variant="stop", interactive=False, elem_id="calibrate-stop"
                )
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
            with gr.Row():
                use = gr.Button("Use it in Generate", visible=False, elem_id="calibrate-use")
                download = gr.DownloadButton(
                    "Download the artifact", visible=False, elem_id="calibrate-download"
                )
                log = gr.DownloadButton("Download the log", visible=False)
            shown = gr.HTML(step_map(None), elem_id="calibrate-map")
            loss = gr.HTML("", elem_id="calibrate-loss")
    watch = Watch(
        key, timer, said, start, stop, resume, discard, sure, unfinished, shown, loss, use,
        download, log,
    )  # fmt: skip
    _wire(bench, watch, fields)
    _wire_discard(bench, watch, yes, no)
    return Calibrate(watch, fields[0], fields)


def _sure() -> tuple[gr.Row, gr.Button, gr.Button]:
    """The question before something is thrown away, hidden, and its two answers."""
    with gr.Row(visible=False, elem_id="calibrate-sure") as sure:
        gr.HTML("<p>Discard it? What was finished of it is lost.</p>")
        yes = gr.Button("Yes, discard", variant="stop", elem_id="calibrate-sure-yes")
        no = gr.Button("No, keep it", elem_id="calibrate-sure-no")
    return sure, yes, no


def _fields(bench: Bench, model_name: str) -> list[Any]:
    """What can be chosen; the order is that of `Bench.calibrate`."""
    model = gr.Dropdown(
        bench.places.models(), value=model_name, label="Model", allow_custom_value=True,
        elem_id="calibrate-model",
    )  # fmt: skip
    name = gr.Textbox(
        "my-artifact", label="Name of the artifact", max_lines=1, elem_id="calibrate-name",
        info="A file NAME.safetensors in the output folder",
    )  # fmt: skip
    scheme = gr.Dropdown(SCHEMES, value="w8a8", label="Scheme", elem_id="calibrate-scheme")
    preset = gr.Radio(
        [(EFFORTS.get(name, name), name) for name in PRESETS], value="quick", label="Preset",
        elem_id="calibrate-preset",
    )  # fmt: skip
    reuse = gr.Slider(
        0, 80, 30, step=5, label="Cache schedule: share of branch calls to reuse, %",
        info="0: no cache schedule", elem_id="calibrate-reuse",
    )  # fmt: skip
    encoder = gr.Radio(
        ENCODERS, value="", label="Text encoders", elem_id="calibrate-encoder",
        info="Their weights alone, beside the rest or by themselves",
    )  # fmt: skip
    *rest, method, rounding = _options()
    return [model, name, scheme, preset, reuse, *rest, encoder, method, rounding]


def _options() -> list[Any]:
    """What is rarely changed; the order is that of `Bench.calibrate`."""
    with gr.Accordion("All options", open=False):
        steps = optional("Steps", "the model's own", "calibrate-steps")
        guidance = optional("Guidance", "the model's own", "calibrate-guidance")
        seed = gr.Number(0, label="First seed", elem_id="calibrate-seed")
        iterations = optional(
            "Training iterations of the router", "the preset's", "calibrate-iterations"
        )
        prompts = gr.Textbox(
            "", label="Calibration prompts, one a line (those that ship)", lines=3,
            elem_id="calibrate-prompts",
        )  # fmt: skip
        rounding = gr.Dropdown(
            [("the preset's choice", ""), *algorithms.names("denoiser")], value="",
            label="How 4-bit weights round", elem_id="calibrate-rounding",
            info="Of the denoiser, where the scheme has such weights",
        )  # fmt: skip
        method = gr.Dropdown(
            list(algorithms.names("encoder")), value="gptq", label="How text encoders round",
            elem_id="calibrate-method", info="Where they are quantized",
        )  # fmt: skip
    return [steps, guidance, seed, iterations, prompts, method, rounding]


def _wire(bench: Bench, watch: Watch, fields: list[Any]) -> None:
    """Buttons, the clock that looks at the job, and the look at it when the page is loaded."""

    def started(begin: Callable[[], Job]) -> str:
        try:
            return begin().id
        except TenutoError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def start(*values: Any) -> str:
        return started(lambda: bench.calibrate(*asked(*values)))

    def look(key: str) -> list[Any]:
        return seen(bench, bench.desk.job(key, "calibrate"))

    shown = {"fn": look, "inputs": watch.key, "outputs": watch.outputs} | QUIET
    watch.start.click(start, fields, watch.key, **AUDIBLE).success(**shown)
    watch.resume.click(
        lambda name: started(lambda: bench.resume(name or "")), watch.unfinished, watch.key,
        **AUDIBLE,
    ).success(**shown)  # fmt: skip
    watch.stop.click(lambda key: bench.stop(key, "calibrate"), watch.key, None, **QUIET).then(
        **shown
    )
    watch.timer.tick(**shown)
    watch.unfinished.input(
        lambda name: [gr.Button(interactive=bool(name))] * 2, watch.unfinished,
        [watch.resume, watch.discard], **QUIET,
    )  # fmt: skip


def _wire_discard(bench: Bench, watch: Watch, yes: gr.Button, no: gr.Button) -> None:
    """Discard asks first."""

    def discarded(name: str | None) -> None:
        try:
            if name:
                bench.discard(name)
        except TenutoError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def look(key: str) -> list[Any]:
        return seen(bench, bench.desk.job(key, "calibrate"))

    watch.discard.click(lambda: gr.Row(visible=True), None, watch.sure, **QUIET)
    no.click(lambda: gr.Row(visible=False), None, watch.sure, **QUIET)
    yes.click(discarded, watch.unfinished, None, **AUDIBLE).then(
        look, watch.key, watch.outputs, **QUIET
    )


def asked(*values: Any) -> list[Any]:
    """What `Bench.calibrate` is asked for, from the fields: what was not chosen is None."""
    model, name, scheme, preset, reuse, *rest, encoder, method, rounding = values
    share = reuse / 100 if reuse else None
    method = method if encoder else None  # its field shows one all the time
    return [
        model, name, scheme or None, preset, share, *rest, encoder or None, method, rounding or None
    ]  # fmt: skip


def filled(job: Job | None) -> list[Any]:
    """The fields of the calibration that runs, the inverse of `asked`: updates for its fields."""
    if job is None or not job.alive:
        return [gr.skip()] * 13
    wanted = job.request
    shown = {
        name: "" if wanted[name] is None else f"{wanted[name]:g}"
        for name in ("steps", "guidance", "iterations")
    }
    return [
        wanted["shown_model"], Path(wanted["out"]).stem, wanted["scheme"] or "", wanted["preset"],
        round(100 * (wanted["reuse"] or 0)), shown["steps"], shown["guidance"], wanted["seed"],
        shown["iterations"], wanted["prompts_text"], wanted["text_encoder"] or "",
        wanted["method"] or "gptq", wanted["rounding"] or "",
    ]  # fmt: skip


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
        gr.Button(interactive=not alive),
        gr.Button(interactive=job is not None and job.state == "running"),
        gr.Button(interactive=not alive and chosen is not None),
        gr.Button(interactive=not alive and chosen is not None),
        gr.Row(visible=False),
        gr.Dropdown(choices=names, value=None if alive else chosen, interactive=not alive),
        step_map(found, done),
        loss_curve(job.loss if job else []),
        gr.Button(visible=done),
        gr.DownloadButton(value=file, visible=done) if done else gr.DownloadButton(visible=False),
        gr.DownloadButton(value=str(job.log), visible=True)
        if job and failed
        else gr.DownloadButton(visible=False),
    ]


def used(bench: Bench, key: str) -> list[Any]:
    """For the tab Generate: the model and the artifact of a calibration that is done."""
    job = bench.desk.job(key, "calibrate")
    if job is None or job.state != DONE:
        return [gr.skip()] * 4
    model, name = job.request["shown_model"], job.result["name"]
    choices = artifact_choices(bench, model)
    artifact = gr.Dropdown(choices=choices, value=name)
    return [model, artifact, (model, name), gr.Tabs(selected="generate")]
