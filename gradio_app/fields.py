"""What fields of the tabs have in common: lists of artifacts, numbers that may be left out."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .bench import NO_ARTIFACT, Bench


def artifact_choices(bench: Bench, model: str) -> list[tuple[str, str]]:
    """What can be generated with, and full precision."""
    return [("none: full precision", NO_ARTIFACT), *((n, n) for n in bench.places.artifacts(model))]


def optional(label: str, absent: str, name: str, value: Any = None, **more: Any) -> gr.Textbox:
    """A field for a number that may be left out: then it is what `absent` says."""
    text = "" if value is None else f"{value:g}"
    return gr.Textbox(text, label=label, placeholder=absent, max_lines=1, elem_id=name, **more)


def shown_number(value: float | None) -> str:
    """A number in a field that may be empty."""
    return "" if value is None else f"{value:.10g}"


def noticed(name: str) -> gr.HTML:
    """A place for a `notice`; it takes no room while there is none."""
    return gr.HTML("", elem_id=name, elem_classes="tenuto-notice")


def goes_on(updates: list[Any]) -> list[Any]:
    """`updates` of a view whose first is its timer, which they may start but not stop.

    The timer's own tick alone stops it. On a busy machine any other answer, such as that to a page
    that opened, may come after a click that has begun a job, and would leave the page standing.
    """
    timer, *rest = updates
    return [timer if timer.active else gr.skip(), *rest]
