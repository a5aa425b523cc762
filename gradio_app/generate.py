"""The tab Generate: one image, with an artifact or without, or both beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from tenuto.errors import TenutoError

from .answers import filling, same_model, seen_last
from .bench import NO_ARTIFACT, Bench
from .call_fields import CallFields, call_fields, watch
from .far import starting
from .fields import artifact_choices, noticed, optional, shown_number
from .lora_field import lora_field
from .making import image_side, made_now
from .restore import aside
from .speedup_fields import OFF, SpeedupFields, default_for, follow, speedup_fields
from .studio import defaults_of
from .view import notice
from .viewer import CHOICE, QUIET

PROMPT = "a golden retriever"
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
    loras: gr.Textbox
    speedup: SpeedupFields
    speeds: list[Any]  # the components that decide what the speedup would do
    filled: list[Any]
    added: gr.HTML  # changes when a folder of models, say, was added


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
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="generate-stop")
            working = gr.HTML("", visible=False, elem_id="generate-working")
            model = gr.Dropdown(
                models, value=model_name, label="Model", allow_custom_value=True,
                info="A model that ships, a folder in diffusers' format, or a single file",
                elem_id="model",
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
            seed, count = _seed_and_count()
            with gr.Row():
                steps_of = gr.Number(steps, label="Steps", step=1, elem_id="steps")
                guidance_of = optional("Guidance", "the model's own", "guidance", guidance)
            chosen = seen_last(model_name, choices[-1][1])
            loras = lora_field("generate")
            own = call_fields("generate")
            settings = [steps_of, guidance_of, speedup.slider]
            filled = [artifact, *settings, speedup.auto, go]
            fields = [prompt, seed, steps_of, guidance_of, model, artifact, speedup.slider, loras]
            added = aside(bench, model, artifact, [*fields, chosen, *own.outputs], filled)
        seen = image_side()
    values = [model, prompt, seed, steps_of, guidance_of, artifact, on, beside]
    values += [seen.view.mode, count, seen.made, speedup.slider, loras, *own.fields]
    _wire(bench, [go, stop, working], prompt, values, seen.outputs)
    watch(bench, model, own)
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
    return Generate(model, artifact, chosen, own, loras, speedup, speeds, filled, added)


def _seed_and_count() -> tuple[gr.Number, gr.Number]:
    """The seed of the first image, and how many there are to be."""
    with gr.Row():
        seed = gr.Number(7, label="Seed", placeholder="any", min_width=90, elem_id="seed")
        count = gr.Number(1, label="Images", step=1, min_width=90, elem_id="count")
        dice = gr.Button("New seed", size="sm", min_width=80, elem_id="new-seed")
    dice.click(None, None, seed, js=ANY_SEED, api_visibility="private")
    return seed, count


def _wire(bench: Bench, parts: list[Any], prompt: gr.Textbox, inputs: Any, outputs: Any) -> None:
    """Generate and Stop: one of them is always there to be pressed. Progress is below them."""
    go, stop, working = parts

    def on_generate(*values: Any) -> Iterator[Any]:
        yield from made_now(bench, *values)

    def buttons(generating: bool) -> list[Any]:
        pressed = [gr.Button(interactive=not generating), gr.Button(interactive=generating)]
        said = starting(bench.desk.image != "none") if generating else ""
        return [*pressed, gr.HTML(said, visible=generating)]

    pressed = gr.on([go.click, prompt.submit], lambda: buttons(True), None, parts, **QUIET)
    made = pressed.then(
        on_generate, inputs, [working, *outputs], api_visibility="private",
        concurrency_id="machine", show_progress="hidden",
    )  # fmt: skip
    for over in (made.then, made.failure):  # Gradio 6.31 runs `then` after an answer alone
        over(lambda: buttons(False), None, parts, **QUIET)
    stop.click(bench.studio.stop, None, None, **QUIET)


def _model_chosen(bench: Bench, name: str, artifact: str, before: Any) -> list[Any]:
    """Artifacts, steps and guidance for a model, if it is another than before."""
    if same_model(before, name):
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
