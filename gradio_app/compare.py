"""The tab Compare: what artifacts cost and what they buy, measured at equal seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from tenuto.errors import TenutoError
from tenuto.measure import BF16, FIRST_SEED, FULL
from tenuto.runtime import EXECUTIONS

from .answers import filling, same_model, seen_last
from .bench import Bench
from .calibrate import STEADY
from .call import OPTIONS, as_fields
from .call_fields import CallFields, call_fields, given, watch
from .call_fields import filled as own_filled
from .fields import goes_on, noticed, optional
from .jobs import DONE, FAILED, RUNNING, WAITING, Job
from .lora_field import given as loras_given
from .lora_field import lora_field
from .loras import as_text
from .measured import compared
from .requests import COUNT
from .speedup import MOST
from .speedup_fields import (
    OFF,
    SpeedupFields,
    default_for,
    follow,
    safest,
    speedup_fields,
    usable,
)
from .view import in_line, notice, status
from .viewer import AUDIBLE, CHOICE, QUIET, Viewer, show, viewer

CHOSEN = 10  # fields before those of the pipeline's own settings
IDLE = "Choose a model, artifacts or a speedup, and press Compare."


@dataclass(frozen=True)
class Compare:
    """The components that the app wires to other tabs.

    chosen: the model and the artifacts that were seen last, as in `Generate`.
    """

    key: gr.BrowserState
    model: gr.Dropdown
    artifacts: gr.Dropdown
    outputs: list[Any]
    fields: list[Any]
    chosen: gr.JSON
    own: CallFields
    loras: gr.Textbox
    speedup: SpeedupFields
    speeds: list[Any]  # the components that decide what the speedup would do


def tab(bench: Bench, model_name: str) -> Compare:
    """The tab's contents."""
    key = gr.BrowserState("", storage_key="tenuto-comparison", secret="tenuto")
    timer = gr.Timer(STEADY, active=False)
    choices = bench.places.artifacts(model_name)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown(
                bench.places.models(), value=model_name, label="Model", allow_custom_value=True,
                elem_id="compare-model",
            )  # fmt: skip
            artifacts = gr.Dropdown(
                choices, value=choices[-1:], label="Artifacts", multiselect=True,
                allow_custom_value=True, elem_id="compare-artifacts",
            )  # fmt: skip
            count = gr.Number(
                8, label="Images", step=1, elem_id="compare-count",
                info=f"Up to {COUNT['most']}: more make the numbers steadier",
            )  # fmt: skip
            speedup = speedup_fields("compare")
            with gr.Row():
                go = gr.Button("Compare", variant="primary", elem_id="compare-start")
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="compare-stop")
            refused = noticed("compare-refused")
            rest = _options()
            loras = lora_field("compare")
            own = call_fields("compare")
        with gr.Column(scale=3, min_width=320):
            said = gr.HTML(status(None, IDLE), elem_id="compare-status")
            numbers = gr.HTML("", elem_id="compare-numbers")
            with gr.Row(visible=False) as chooser:
                which = gr.Dropdown([], label="B is", elem_id="compare-which")
                number = gr.Slider(1, 2, 1, step=1, label="Image", elem_id="compare-picture")
            prompt = gr.Markdown("", elem_id="compare-prompt")
            view = viewer("compare", "Images")
            with gr.Row():
                file = gr.DownloadButton("Download the numbers", visible=False)
                log = gr.DownloadButton("Download the log", visible=False)
    outputs = [timer, said, go, stop, numbers, chooser, which, number, file, log]
    looks = [view.pair, prompt, *view.outputs]
    fields = [model, artifacts, count, *rest, speedup.slider, loras, *own.fields]
    speeds = [model, artifacts, rest[0]]
    chosen = seen_last(model_name, choices[-1:])
    made = Compare(key, model, artifacts, outputs, fields, chosen, own, loras, speedup, speeds)
    _wire(bench, made, (timer, go, stop, refused))
    watch(bench, model, own)
    follow(bench, speedup, speeds)
    _pictures(bench, key, which, number, view, looks)
    return made


def _options() -> list[Any]:
    """What is rarely changed; the order is that of `Bench.compare`."""
    with gr.Accordion("All options", open=False):
        steps = optional("Steps", "the artifact's", "compare-steps")
        guidance = optional("Guidance", "the artifact's", "compare-guidance")
        seed = gr.Number(FIRST_SEED, label="First seed", elem_id="compare-seed")
        execution = gr.Radio(
            list(EXECUTIONS), value="int8", label="Execution",
            info="int8: the artifact's own arithmetic; auto: by layer, what is not slower here",
        )  # fmt: skip
        prompts = gr.Textbox("", label="Prompts, one a line (those that ship)", lines=3)
    return [steps, guidance, seed, execution, prompts]


def _wire(bench: Bench, made: Compare, parts: tuple[Any, ...]) -> None:
    timer, go, stop, refused = parts

    def start(*values: Any) -> list[Any]:
        *chosen, speedup, loras = values[:CHOSEN]
        try:
            call = given(bench, chosen[0], values[CHOSEN:])
            faster = usable(bench, chosen[0], chosen[1], speedup)
            loras = loras_given(bench.places, chosen[0], loras)
            job = bench.compare(*chosen, call=call, speedup=faster, loras=loras)
            return [job.id, in_line(job)]
        except TenutoError as error:
            return [gr.skip(), notice("It is not started.", str(error))]

    def look(key: str) -> list[Any]:
        return seen(bench.desk.job(key, "compare"))

    ticked: dict[str, Any] = {"fn": look, "inputs": made.key, "outputs": made.outputs} | QUIET
    shown: dict[str, Any] = ticked | {"fn": lambda key: goes_on(look(key))}
    go.click(start, made.fields, [made.key, refused], **AUDIBLE).then(**shown)
    stop.click(lambda key: bench.stop(key, "compare"), made.key, None, **QUIET).then(**shown)
    timer.tick(**ticked)
    _wire_choices(bench, made, go)


def _wire_choices(bench: Bench, made: Compare, go: gr.Button) -> None:
    """What a model and artifacts bring along, if they are others than before."""

    def model_chosen(name: str, _: Any, before: Any) -> list[Any]:
        if same_model(before, name):
            return [gr.skip(), gr.skip()]
        return [gr.Dropdown(choices=bench.places.artifacts(name), value=[]), [name, []]]

    def artifacts_chosen(model: str, names: Any, before: Any) -> list[Any]:
        if before == [model, names]:
            return [gr.skip(), gr.skip()]
        return [default_for(bench, names), [model, names]]

    slider, auto = made.speedup.slider, made.speedup.auto
    asked = [made.model, made.artifacts, made.chosen]
    filling(
        made.model.change, model_chosen, asked, [made.artifacts, made.chosen],
        [made.artifacts, slider, auto, go], chosen=True, **CHOICE,
    )  # fmt: skip
    filling(
        made.artifacts.change, artifacts_chosen, asked, [slider, made.chosen], [slider, auto, go],
        chosen=True, **CHOICE,
    )  # fmt: skip


def filled(bench: Bench, job: Job | None) -> list[Any]:
    """The comparison that runs: updates for its fields, the accordion and `chosen`."""
    if job is None or not job.alive:
        return [gr.skip()] * (CHOSEN + len(OPTIONS) + 3)
    asked = job.request
    model, names = asked["shown_model"], list(asked["names"].values())
    artifacts = gr.Dropdown(
        choices=bench.places.artifacts(model), value=names, multiselect=True,
        allow_custom_value=True,
    )  # fmt: skip
    shown = ["" if asked[name] is None else f"{asked[name]:g}" for name in ("steps", "guidance")]
    rest = [asked["seed"], asked["execution"], asked["prompts_text"]]
    speedup = asked["speedup"] or OFF
    auto = isinstance(speedup, str)  # by the API
    rest.append(safest(bench, model, names, asked["steps"]) if auto else min(speedup, MOST))
    rest.append(as_text(asked["loras"]))
    own = as_fields(asked["call"], bench.places.inputs)
    return [model, artifacts, asked["count"], *shown, *rest, *own_filled(own), [model, names]]


def seen(job: Job | None) -> list[Any]:
    """The view of a comparison, in whatever state it is."""
    alive, done = job is not None and job.alive, job is not None and job.state == DONE
    result = job.result if job and done else {}
    names = [name for name in result.get("pictures", {}) if name != FULL]
    count = len(result.get("prompts", ()))
    folder = Path(result["folder"]) if done else None
    return [
        gr.Timer(active=alive),
        status(job, IDLE),
        gr.Button(interactive=True),
        gr.Button(interactive=job is not None and job.state in (WAITING, RUNNING)),
        compared(result["numbers"]) if done else "",
        gr.Row(visible=done),
        gr.Dropdown(choices=names, value=names[0]) if done else gr.skip(),
        gr.Slider(maximum=max(2, count), value=1, visible=count > 1) if done else gr.skip(),
        gr.DownloadButton(value=str(folder / "comparison.json"), visible=True)
        if folder
        else gr.DownloadButton(visible=False),
        gr.DownloadButton(value=str(job.log), visible=True)
        if job and job.state == FAILED
        else gr.DownloadButton(visible=False),
    ]


def _pictures(
    bench: Bench, key: Any, which: gr.Dropdown, number: gr.Slider, view: Viewer, looks: list[Any]
) -> None:
    """Which two images are looked at."""

    def look(key: str, which: str | None, number: float, mode: str) -> list[Any]:
        job = bench.desk.job(key, "compare")
        if job is None or job.state != DONE or which not in job.result["pictures"]:
            return [None, "", *show(None, mode)]
        found, i = job.result, int(number) - 1
        folder = Path(found["folder"])
        a, b = (str(folder / found["pictures"][name][i]) for name in (FULL, which))
        pair = {"a": a, "b": b, "names": [FULL, f"plain {BF16}" if which == BF16 else which]}
        return [pair, f"Image {i + 1}: *{plain(found['prompts'][i])}*", *show(pair, mode)]

    for event in (which.change, number.change):
        event(look, [key, which, number, view.mode], looks, **QUIET)


def plain(text: str) -> str:
    """Text in which Markdown and HTML mean nothing."""
    kept = "".join(c if c.isalnum() or c in " ,.-'" else " " for c in text)
    return kept[:200].strip()


def refreshed(bench: Bench, model: str) -> Any:
    """The artifacts that there are by now."""
    return gr.Dropdown(choices=bench.places.artifacts(model))


def used(bench: Bench, key: Any) -> list[Any]:
    """What was seen last, the model of a calibration that is done, this tab, and the artifact.

    The artifact is not yet among what was seen last: its speedup follows.
    """
    job = bench.desk.job(key, "calibrate")
    if job is None or job.state != DONE:
        return [gr.skip()] * 4
    model, name = job.request["shown_model"], job.result["name"]
    artifacts = gr.Dropdown(
        choices=bench.places.artifacts(model), value=[name], multiselect=True,
        allow_custom_value=True,
    )  # fmt: skip
    return [[model, None], model, gr.Tabs(selected="compare"), artifacts]
