"""The tab Generate: one image, with an artifact or without, or both beside each other."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import gradio as gr

from tenuto.errors import Cancelled, TenutoError

from .answers import filling, seen_last
from .bench import NO_ARTIFACT, Bench
from .call_fields import CallFields, call_fields, given, watch
from .fields import artifact_choices, noticed, optional, shown_number
from .measured import compared, generated
from .restore import aside
from .speedup_fields import OFF, SpeedupFields, default_for, follow, speedup_fields, usable
from .studio import defaults_of
from .view import card, notice
from .viewer import CHOICE, QUIET, Pair, show, viewer

IDLE = card("idle", "No image yet.", "Write a prompt and press Generate.")
WORKING = 76  # pixels of the place where progress is shown
PROMPT = "a golden retriever"
FULL = "full precision"
ANY_SEED = "() => Math.floor(Math.random() * 2 ** 32)"  # in the page: it comes at once


@dataclass(frozen=True)
class Generate:
    """The components that the app wires. chosen: the model and artifact that were seen last.

    What the app itself fills in changes a dropdown, too: only what differs from `chosen` was
    chosen. filled: what a choice fills in or leaves waiting, after `answers.filling`.
    """

    model: gr.Dropdown
    artifact: gr.Dropdown
    chosen: gr.JSON
    own: CallFields
    speedup: SpeedupFields
    speeds: list[Any]  # the components that decide what the speedup would do
    filled: list[Any]


def tab(bench: Bench) -> Generate:
    """The tab's contents."""
    models = bench.places.models()
    model_name = models[0] if models else ""
    choices = artifact_choices(bench, model_name)
    steps, guidance = (20, 2.0) if not models else defaults_of(bench.places.model(model_name))
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=6, elem_id="prompt")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", interactive=False, elem_id="generate-stop")
            working = gr.HTML("", visible=False, elem_id="generate-working", min_height=WORKING)
            model = gr.Dropdown(
                models, value=model_name, label="Model", allow_custom_value=True,
                info="A model that ships, or a folder in diffusers' format", elem_id="model",
            )  # fmt: skip
            refused = noticed("model-refused")
            artifact = gr.Dropdown(
                choices, value=choices[-1][1], label="Artifact", allow_custom_value=True,
                elem_id="artifact",
            )  # fmt: skip
            with gr.Row():
                on = gr.Checkbox(True, label="Artifact on", elem_id="artifact-on")
                beside = gr.Checkbox(True, label="Beside full precision", elem_id="beside")
            speedup = speedup_fields("generate")
            with gr.Row():
                seed = gr.Number(7, label="Seed (empty: any)", minimum=0, elem_id="seed")
                dice = gr.Button("New seed", size="sm", min_width=80, elem_id="new-seed")
            with gr.Row():
                steps_of = gr.Number(steps, label="Steps", step=1, elem_id="steps")
                guidance_of = optional("Guidance", "the model's own", "guidance", guidance)
            chosen = seen_last(model_name, choices[-1][1])
            own = call_fields("generate")
            settings = [steps_of, guidance_of, speedup.slider]
            filled = [artifact, *settings, speedup.auto, go]
            fields = [prompt, seed, steps_of, guidance_of, model, artifact, speedup.slider, chosen]
            aside(bench, model, artifact, [*fields, *own.outputs], filled)
        with gr.Column(scale=3, min_width=320):
            view = viewer("generate", "Image")
            numbers = gr.HTML(IDLE, elem_id="numbers")
            infotext = gr.Textbox(
                label="Settings, as in the PNG", lines=2, interactive=False, visible=False,
                buttons=["copy"], elem_id="infotext",
            )  # fmt: skip
    inputs = [model, prompt, seed, steps_of, guidance_of, artifact, on, beside, view.mode]
    inputs.append(speedup.slider)
    outputs = [view.pair, numbers, infotext, *view.outputs]
    _wire(bench, [go, stop, working], prompt, [*inputs, *own.fields], outputs)
    watch(bench, model, own)
    dice.click(None, None, seed, js=ANY_SEED, api_visibility="private")
    told, asked = [*settings, chosen, refused], [model, artifact, chosen]
    filling(
        model.change, lambda *now: _model_chosen(bench, *now), asked, [artifact, *told], filled,
        chosen=True, **CHOICE,
    )  # fmt: skip
    filling(
        artifact.change, lambda *now: _artifact_chosen(bench, *now), asked, told, filled[1:],
        chosen=True, **CHOICE,
    )  # fmt: skip
    speeds = [model, artifact, steps_of, on]
    follow(bench, speedup, speeds)
    return Generate(model, artifact, chosen, own, speedup, speeds, filled)


def _wire(bench: Bench, parts: list[Any], prompt: gr.Textbox, inputs: Any, outputs: Any) -> None:
    """Generate and Stop: one of them is always there to be pressed. Progress is below them."""
    go, stop, working = parts

    def on_generate(*values: Any, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        return generated_now(bench, progress, *values)

    def buttons(generating: bool) -> list[Any]:
        pressed = [gr.Button(interactive=not generating), gr.Button(interactive=generating)]
        return [*pressed, gr.HTML(visible=generating)]

    gr.on([go.click, prompt.submit], lambda: buttons(True), None, parts, **QUIET).then(
        on_generate, inputs, outputs, api_visibility="private", concurrency_id="machine",
        show_progress_on=[working],
    ).then(lambda: buttons(False), None, parts, **QUIET)  # fmt: skip
    stop.click(bench.studio.stop, None, None, **QUIET)


def generated_now(bench: Bench, progress: gr.Progress, *values: Any) -> list[Any]:
    """What the image side shows after a press of Generate: generated, stopped or failed."""
    from tenuto.cli.checks import device_of

    model, prompt, seed, steps, guidance, artifact, on, beside, mode, speedup, *own = values
    used = artifact if on else NO_ARTIFACT

    def on_call(done: int, total: int) -> None:
        progress((done, total), desc="Generating", unit="calls")

    nothing: list[Any] = [gr.skip()] * 7
    try:
        progress(0, desc="Loading the model")
        found = bench.generate(
            model, prompt, seed, steps, guidance, used, beside, on_call, given(bench, model, own),
            usable(bench, model, artifact, speedup, on),
        )  # fmt: skip
    except Cancelled:
        return [nothing[0], card("stopped", "Stopped.", "Nothing was saved."), *nothing[1:]]
    except TenutoError as error:
        return [nothing[0], card("failed", "It cannot be generated.", str(error)), *nothing[1:]]
    except Exception as error:  # of the model itself: no memory left, say
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"[:300]
        return [nothing[0], card("failed", "Generating failed.", said), *nothing[1:]]
    pictures, said = found["pictures"], found["numbers"]
    if len(pictures) == 2:
        names = [FULL, found["artifact"]]
        pair: Pair = {"a": pictures["full"], "b": pictures["artifact"], "names": names}
        numbers = compared({found["artifact"]: said})
    else:
        ((which, path),) = pictures.items()
        pair = {"a": path, "names": [FULL if which == "full" else found["artifact"]]}
        device = str(device_of(bench.settings.device))
        numbers = generated(said, found["seconds"], found["steps"], device)
    pair["frames"] = found["frames"]
    info = gr.Textbox(found["infotext"], visible=True)
    return [pair, numbers, info, *show(pair, mode)]


def _model_chosen(bench: Bench, name: str, artifact: str, before: Any) -> list[Any]:
    """Artifacts, steps and guidance for a model, if it is another than before."""
    if before and before[0] == name:
        return [gr.skip()] * 6
    try:
        steps, guidance = defaults_of(bench.places.model(name))
    except TenutoError as error:
        return [*[gr.skip()] * 5, notice("This model cannot be used.", str(error))]
    new = gr.Dropdown(choices=artifact_choices(bench, name), value=NO_ARTIFACT)
    return [new, steps, shown_number(guidance), OFF, [name, NO_ARTIFACT], ""]


def _artifact_chosen(bench: Bench, model: str, name: str, before: Any) -> list[Any]:
    """Steps, guidance and speedup that an artifact was made for, if it is another than before."""
    if before == [model, name]:
        return [gr.skip()] * 5
    try:
        file = bench.places.artifact(name) if name else None
        steps, guidance = defaults_of(bench.places.model(model), file)
        return [steps, shown_number(guidance), default_for(bench, name), [model, name], ""]
    except TenutoError as error:
        return [*[gr.skip()] * 4, notice("This artifact cannot be used.", str(error))]
