"""What was asked for while something else is at work: the line, above the tabs while there is one.

It is the app's, not the page's: it is there after a reload, and in every other page.
"""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from tenuto.text import printable

from .bench import Bench
from .jobs import NAMES, Job
from .view import WAITS, card, words_of
from .viewer import QUIET

EVERY = 2  # seconds between two looks: each takes a page 0.1 s of a processor
TEXT = 120  # characters of a row


def line(bench: Bench) -> None:
    """The components, and the timer that looks at the line."""
    with gr.Group(visible=False, elem_id="line") as group:
        said = gr.HTML("", elem_id="line-said")
        with gr.Row():
            which = gr.Dropdown([], label="In line", elem_id="line-which", min_width=220)
            out = gr.Button("Remove from the line", size="sm", elem_id="line-remove")
    seen = gr.JSON([], visible=False)
    outputs = [group, said, which, seen]

    def look(before: Any) -> list[Any]:
        return updates(bench, before)

    def remove(key: Any, before: Any) -> list[Any]:
        bench.desk.remove(key)
        return updates(bench, before)

    gr.Timer(EVERY).tick(look, seen, outputs, **QUIET)
    out.click(remove, [which, seen], outputs, **QUIET)


def updates(bench: Bench, before: Any) -> list[Any]:
    """Updates for the components; none where the line is what it was: a list may be open."""
    waiting = bench.desk.line
    now = [one.id for one in waiting]
    if now == before:
        return [gr.skip()] * 4
    rows = [(f"{place}. {shown(one)}", one.id) for place, one in enumerate(waiting, start=1)]
    listed = "".join(f"<li>{escape(text)}</li>" for text, _ in rows)
    title = f"{len(rows)} in line." if rows else "Nothing is in line."
    text = card("waiting", title, WAITS, f'<ul class="tenuto-line">{listed}</ul>' * bool(rows))
    chosen = gr.Dropdown(choices=rows, value=now[-1] if now else None)
    return [gr.Group(visible=bool(rows)), text, chosen, now]


def shown(one: Any) -> str:
    """What stands in line, in a row."""
    what = words_of(one) if isinstance(one, Job) else one.text
    kind = NAMES.get(one.kind, "image").capitalize()
    return printable(f"{kind}: {what}", TEXT)
