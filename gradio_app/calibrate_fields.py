"""The fields of the tab Calibrate, what they ask for, and what they show of a job that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from tenuto.calibration import PRESETS, WIDTHS, algorithms
from tenuto.numerics import known, label

from .bench import Bench
from .call import OPTIONS, as_fields
from .call_fields import CallFields, call_fields, given, watch
from .call_fields import filled as own_filled
from .fields import optional
from .jobs import Job
from .profiles import follow, profile_field

SCHEMES = [
    *((label(scheme), name) for name, scheme in known().items()),
    ("none: the denoiser keeps its weights", ""),
]
ENCODERS = [("Leave as they are", ""), *((f"{width[1:]} bits", width) for width in WIDTHS)]
EFFORTS = {
    "quick": "quick: a few minutes for a small model", "standard": "standard: four times the data",
    "thorough": "thorough: for the final file",
}  # fmt: skip
CHOSEN = 13  # fields before those of the pipeline's own settings
FIELDS = CHOSEN + len(OPTIONS) + 2  # which `filled` fills


def calibration_fields(bench: Bench, model_name: str) -> tuple[list[Any], CallFields]:
    """What can be chosen, in the order of `Bench.calibrate`, and the pipeline's own below it."""
    model = gr.Dropdown(
        bench.places.models(), value=model_name, label="Model", allow_custom_value=True,
        elem_id="calibrate-model",
    )  # fmt: skip
    name = gr.Textbox(
        "my-artifact", label="Name of the artifact", max_lines=1, elem_id="calibrate-name",
        info="A file NAME.safetensors in the output folder",
    )  # fmt: skip
    profile = profile_field()
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
    follow(profile, [scheme, preset, reuse, encoder])
    own = call_fields("calibrate")
    watch(bench, model, own)
    chosen = [model, name, scheme, preset, reuse, *rest, encoder, method, rounding]
    return [*chosen, *own.fields], own


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


def asked(bench: Bench, *values: Any) -> list[Any]:
    """What `Bench.calibrate` is asked for, from the fields: what was not chosen is None."""
    (model, name, scheme, preset, reuse, *rest, encoder, method, rounding), own = (
        values[:CHOSEN], values[CHOSEN:],
    )  # fmt: skip
    share = reuse / 100 if reuse else None
    method = method if encoder else None  # its field shows one all the time
    return [
        model, name, scheme or None, preset, share, *rest, encoder or None, method,
        rounding or None, given(bench, model, own),
    ]  # fmt: skip


def filled(bench: Bench, job: Job | None) -> list[Any]:
    """The calibration that runs, the inverse of `asked`: updates for its fields and accordion."""
    if job is None or not job.alive:
        return [gr.skip()] * FIELDS
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
        *own_filled(as_fields(wanted["call"], bench.places.inputs)),
    ]  # fmt: skip
