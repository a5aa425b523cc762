"""Fields that an answer of the server fills: nothing is typed into them until it has come."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

LONGEST = 30_000  # milliseconds: then they can be used all the same
COUNT = itertools.count()

CLOSE = """(...values) => {{
  const now = [...values], seen = now.pop();
  if ({chosen} && JSON.stringify(seen) === JSON.stringify(now)) return values;
  for (const place of {places}) {{
    const field = document.getElementById(place);
    if (!field) continue;
    field.awaited = (field.awaited || new Set()).add({key});
    field.inert = true;
    clearTimeout(field.longest);
    field.longest = setTimeout(() => {{ field.awaited.clear(); field.inert = false; }}, {longest});
  }}
  return values;
}}"""
OPEN = """() => {{
  for (const place of {places}) {{
    const field = document.getElementById(place);
    if (!field || !field.awaited) continue;
    field.awaited.delete({key});
    field.inert = field.awaited.size > 0;
  }}
}}"""


def seen_last(*values: Any) -> gr.JSON:
    """What was chosen as the app saw it last; nobody sees this component.

    values: of the components that a listener gets before it.
    """
    return gr.JSON([*values], visible=False)


def same_model(before: Any, name: str) -> bool:
    """Whether a model is the one that was seen last; `before` comes from a page: it may be any."""
    return isinstance(before, (list, tuple)) and len(before) > 0 and before[0] == name


def filling(
    event: Callable[..., Any],
    answer: Callable[..., Any],
    inputs: Any,
    outputs: Any,
    fields: Sequence[Any],
    chosen: bool = False,
    **options: Any,
) -> Any:
    """Listen to `event`; while `answer` is awaited `fields` can be neither clicked nor typed into.

    On a busy machine the answer comes late, and would replace what was typed meanwhile. fields:
    components with an `elem_id`: those that the answer fills, and buttons that would use them.
    chosen: the last of `inputs` is what was seen last (`seen_last`), and where the others are just
    that nothing is waited for. Gradio 6.31 runs `then` after an answer, `failure` after an error.
    """
    places, key = json.dumps([field.elem_id for field in fields]), next(COUNT)
    close = CLOSE.format(chosen=json.dumps(chosen), places=places, key=key, longest=LONGEST)
    asked = event(answer, inputs, outputs, js=close, **options)
    opened = {"js": OPEN.format(places=places, key=key), "api_visibility": "private"}
    for after in (asked.then, asked.failure):
        after(None, None, None, **opened)
    return asked
