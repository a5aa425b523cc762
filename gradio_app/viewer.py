"""Two images beside each other: under a slider, one by one, or as their difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from tenuto.measure.sheet import difference

SLIDER, A, B, DIFFERENCE = "Slider", "A", "B", "Difference"
GAIN = 8
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
AUDIBLE: dict[str, Any] = QUIET | {"queue": True}  # errors are shown of what is queued alone
Pair = dict[str, Any]  # "a", "b": paths, b may be missing; "names": of both


@dataclass(frozen=True)
class Viewer:
    """Its components; `outputs` is what `show` returns updates for."""

    pair: gr.State
    mode: gr.Radio
    slider: gr.ImageSlider
    place: gr.Slider
    image: gr.Image

    @property
    def outputs(self) -> list[Any]:
        """What `show` fills."""
        return [self.mode, self.slider, self.place, self.image]


def optional(label: str, absent: str, name: str, value: Any = None) -> gr.Textbox:
    """A field for a number that may be left out: then it is what `absent` says."""
    text = "" if value is None else f"{value:g}"
    return gr.Textbox(text, label=label, placeholder=absent, max_lines=1, elem_id=name)


def viewer(name: str, label: str) -> Viewer:
    """The components, empty. The slider under the images is for those who use a keyboard."""
    pair = gr.State(None)
    mode = gr.Radio([SLIDER, A, B, DIFFERENCE], value=SLIDER, label="Show", visible=False)
    slider = gr.ImageSlider(
        label=label, visible=False, interactive=False, buttons=["fullscreen"],
        elem_id=f"{name}-slider", elem_classes="tenuto-picture", max_height=640,
    )  # fmt: skip
    place = gr.Slider(
        0, 100, 50, step=1, label="Place of the divider", visible=False, elem_id=f"{name}-place"
    )
    image = gr.Image(
        label=label, interactive=False, buttons=["download", "fullscreen"], format="png",
        elem_id=f"{name}-image", elem_classes="tenuto-picture", alt_text=label,
        visible=False,
    )  # fmt: skip
    made = Viewer(pair, mode, slider, place, image)
    mode.input(show, [pair, mode], made.outputs, **QUIET)
    place.input(lambda at: gr.ImageSlider(slider_position=at), place, slider, **QUIET)
    return made


def show(pair: Pair | None, mode: str) -> list[Any]:
    """Updates for `Viewer.outputs`."""
    if not pair:
        hidden = gr.skip(), gr.ImageSlider(visible=False), gr.Slider(visible=False)
        return [*hidden, gr.Image(value=None, visible=False)]
    both = pair.get("b") is not None
    names = pair["names"]
    sliding = both and mode == SLIDER
    choices = [
        (SLIDER, SLIDER), (f"A: {names[0]}", A), (f"B: {names[-1]}", B),
        (f"Difference × {GAIN}", DIFFERENCE),
    ]  # fmt: skip
    image = None if sliding else _one(pair, mode if both else A)
    said = {A: names[0], B: names[-1], DIFFERENCE: f"Difference × {GAIN}"}.get(mode, names[0])
    said = said if both else names[0]
    return [
        gr.Radio(choices=choices, value=mode, visible=both),
        gr.ImageSlider(
            value=(pair["a"], pair["b"]) if sliding else None,
            visible=sliding,
            label="A left, B right",
        ),
        gr.Slider(visible=sliding),
        gr.Image(value=image, visible=not sliding, label=said, alt_text=said),
    ]


def _one(pair: Pair, mode: str) -> Any:
    if mode == DIFFERENCE:
        with Image.open(pair["a"]) as one, Image.open(pair["b"]) as other:
            return difference(one, other, GAIN)
    return pair["b"] if mode == B else pair["a"]
