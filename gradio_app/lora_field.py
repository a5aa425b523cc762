"""The field for LoRAs in Generate and Compare: shown where a model's pipeline loads them."""

from __future__ import annotations

from html import escape
from itertools import islice
from typing import Any

import gradio as gr

from tenuto.errors import TenutoError
from tenuto.sampling.loading import class_of
from tenuto.sampling.loras import check_takes_loras, takes_loras

from .places import Places
from .viewer import QUIET

LABEL = "LoRAs, one a line: name, or name:weight"
LISTED = 12  # names that are shown


def lora_field(name: str) -> gr.Textbox:
    """The component, hidden until it is known that the model takes LoRAs."""
    return gr.Textbox(
        "", label=LABEL, lines=2, max_lines=8, visible=False, elem_id=f"{name}-loras"
    )  # fmt: skip


def given(places: Places, model: Any, text: Any) -> Any:
    """What the field says; nothing while it is not shown."""
    return text if takes_loras(_kind(places, model)) else ""


def shown(places: Places, model: Any) -> Any:
    """An update of the field for a model."""
    kind = _kind(places, model)
    if not takes_loras(kind):
        return gr.Textbox(visible=False)
    return gr.Textbox(visible=True, info=_listed(places, kind))


def _kind(places: Places, model: Any) -> type | None:
    """The class of its pipeline, where it is known."""
    try:
        return class_of(places.model(model))
    except TenutoError:
        return None


def _listed(places: Places, kind: type) -> str:
    """Which LoRAs there are, or what to do."""
    try:
        check_takes_loras(kind)
    except TenutoError as error:  # PEFT is missing
        return escape(str(error))
    first = [_plain(name) for name in islice(places.loras(), LISTED + 1)]
    if not first:
        return "None is there: put .safetensors files into a folder with models"
    more = " and more" * (len(first) > LISTED)
    return f"There are: {', '.join(first[:LISTED])}{more}"


def _plain(name: str) -> str:
    """A name in which neither Markdown nor HTML means anything."""
    return "".join(c if c.isalnum() or c in " /.-" else f"&#{ord(c)};" for c in name)


def watch(places: Places, model: gr.Dropdown, field: gr.Textbox, added: gr.HTML) -> None:
    """Show the field when the model takes LoRAs. added: changes when a folder was added."""
    gr.on(
        [model.change, added.change], lambda name: shown(places, name), model, field, **QUIET
    )  # fmt: skip
