"""The fields for the pipeline's own settings, folded: each is shown where a model takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tenuto.errors import TenutoError
from tenuto.sampling.loading import class_of

from .bench import Bench
from .call import IMAGES, OPTIONS, Fields, from_fields, opened, others, taken
from .fields import noticed, optional
from .guard import fresh
from .view import notice
from .viewer import QUIET

TITLE = "The pipeline's own settings"
HIGH = 200  # pixels of a place for an image


@dataclass(frozen=True)
class CallFields:
    """Its components; `fields` are what a listener gets, in the order of OPTIONS and then more.

    What `shown` and `filled` fill are the fields and the accordion: `outputs`.
    """

    fields: list[Any]
    accordion: gr.Accordion

    @property
    def outputs(self) -> list[Any]:
        """The fields and the accordion."""
        return [*self.fields, self.accordion]


def call_fields(name: str) -> CallFields:
    """The components, hidden until it is known what the model takes."""
    with gr.Accordion(TITLE, open=False, visible=False, elem_id=f"{name}-call") as accordion:
        images = [
            _image("Image to start from", f"{name}-image-from"),
            _image("Mask: white is what changes", f"{name}-mask"),
        ]
        said = noticed(f"{name}-call-said")
        with gr.Row():
            sizes = [
                optional("Height, pixels", "as usual", f"{name}-height"),
                optional("Width, pixels", "as usual", f"{name}-width"),
                optional("Frames of the video", "as usual", f"{name}-frames"),
            ]
        negative = gr.Textbox(
            "", label="Negative prompt", placeholder="what images should not show", lines=1,
            max_lines=4, elem_id=f"{name}-negative",
        )  # fmt: skip
        more = gr.Textbox(
            "", label="Other settings, one a line: name = value", lines=2, max_lines=8,
            elem_id=f"{name}-more",
        )  # fmt: skip
    for box in images:
        box.input(_taken, box, [box, said], **QUIET)
    return CallFields([*images, *sizes, negative, more], accordion)


def _image(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"],
        height=HIGH, buttons=[], elem_id=name, alt_text=label,
    )  # fmt: skip


def _taken(path: str | None) -> list[Any]:
    """A new image in place of its upload, upright and of a known size, or why it is none.

    The upload is left to the sweep: the page may be loading it to show it.
    """
    if path is None:
        return [None, ""]
    file = Path(path)
    try:
        image = opened(file, "image")
        place = fresh(f"{file.stem}.png")
        image.save(place, format="PNG")
    except TenutoError as error:
        return [None, notice(f"{file.name} is not taken.", str(error))]
    return [str(place), ""]


def shown(bench: Bench, model: Any) -> list[Any]:
    """Which fields are seen for a model: updates for `CallFields.outputs`."""
    try:
        kind = class_of(bench.places.model(model))
    except TenutoError:
        return [gr.skip()] * (len(OPTIONS) + 2)
    names = taken(kind)
    updates: list[Any] = [
        (gr.Image if option in IMAGES else gr.Textbox)(visible=option in names)
        for option in OPTIONS
    ]
    known = ", ".join(others(kind))
    info = f"{kind.__name__} takes, among others: {known}" if kind and known else ""
    more = gr.Textbox(info=escape(info), placeholder=_example(others(kind)))
    return [*updates, more, gr.Accordion(visible=kind is not None)]


def _example(names: Sequence[str]) -> str:
    return f"{names[0]} = 0.5" if names else "name = value"


def given(bench: Bench, model: Any, values: Sequence[Any]) -> dict[str, Any]:
    """What the fields say, in the order of `CallFields.fields`."""
    *fields, more = values
    kind = class_of(bench.places.model(model))
    return from_fields(kind, dict(zip(OPTIONS, fields, strict=True)), more)


def filled(found: Fields) -> list[Any]:
    """Updates for `CallFields.outputs`: what is filled in is not folded away."""
    values = [*(found.values[option] for option in OPTIONS), found.more]
    return [*values, gr.Accordion(open=True) if any(values) else gr.skip()]


def watch(bench: Bench, model: gr.Dropdown, made: CallFields) -> None:
    """Show what the model takes, when it changes."""
    model.change(lambda name: shown(bench, name), model, made.outputs, **QUIET)
