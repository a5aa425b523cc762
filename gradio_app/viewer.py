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
AUDIBLE: dict[str, Any] = QUIET | {"queue": True}  # a failure is shown of what is queued alone
CHOICE: dict[str, Any] = AUDIBLE | {"trigger_mode": "always_last"}
Pair = dict[str, Any]  # "a", "b": paths, b may be missing; "names": of both; "frames": of a video


@dataclass(frozen=True)
class Viewer:
    """Its components; `outputs` is what `show` returns updates for."""

    pair: gr.State
    mode: gr.Radio
    slider: gr.ImageSlider
    place: gr.Slider
    frame: gr.Slider
    image: gr.Image

    @property
    def outputs(self) -> list[Any]:
        """What `show` fills."""
        return [self.mode, self.slider, self.place, self.frame, self.image]


def viewer(name: str, label: str) -> Viewer:
    """The components, empty. The slider under the images is for those who use a keyboard."""
    pair = gr.State(None)
    mode = gr.Radio([SLIDER, A, B, DIFFERENCE], value=SLIDER, label="Show", visible=False)
    slider = gr.ImageSlider(
        label=label, visible=False, interactive=False, buttons=["fullscreen"],
        elem_id=f"{name}-slider", elem_classes="tenuto-picture", max_height=640, format="png",
    )  # fmt: skip
    place = gr.Slider(
        0, 100, 50, step=1, label="Divider position", visible=False, elem_id=f"{name}-place"
    )
    frame = gr.Slider(
        0, 2, 0, step=1, label="Frame", info="0: the video moves", visible=False,
        elem_id=f"{name}-frame",
    )  # fmt: skip
    image = gr.Image(
        label=label, interactive=False, buttons=["download", "fullscreen"], format="png",
        elem_id=f"{name}-image", elem_classes="tenuto-picture", alt_text=label,
        visible=False,
    )  # fmt: skip
    made = Viewer(pair, mode, slider, place, frame, image)
    mode.input(show, [pair, mode, frame], made.outputs, **QUIET)
    frame.input(
        lambda *now: [show(*now)[i] for i in (1, 4)], [pair, mode, frame], [slider, image], **QUIET
    )
    place.input(lambda at: gr.ImageSlider(slider_position=at), place, slider, **QUIET)
    return made


def show(pair: Pair | None, mode: str, frame: float = 0) -> list[Any]:
    """Updates for `Viewer.outputs`. frame: which of a video, from 1 on; 0: all, moving."""
    if not pair:
        hidden = [gr.ImageSlider(visible=False), gr.Slider(visible=False), gr.Slider(visible=False)]
        return [gr.skip(), *hidden, gr.Image(value=None, visible=False)]
    both, count = pair.get("b") is not None, pair.get("frames", 1)
    names, at = pair["names"], min(int(frame or 0), count) if count > 1 else 0
    sliding = both and mode == SLIDER
    choices = [
        (SLIDER, SLIDER), (f"A: {names[0]}", A), (f"B: {names[-1]}", B),
        (f"Difference × {GAIN}", DIFFERENCE),
    ]  # fmt: skip
    image = None if sliding else _one(pair, mode if both else A, at)
    said = {A: names[0], B: names[-1], DIFFERENCE: f"Difference × {GAIN}"}.get(mode, names[0])
    said = said if both else names[0]
    return [
        gr.Radio(choices=choices, value=mode, visible=both),
        gr.ImageSlider(
            value=(_frame(pair["a"], at), _frame(pair["b"], at)) if sliding else None,
            visible=sliding,
            label="A left, B right",
            format="png",
        ),
        gr.Slider(visible=sliding),
        gr.Slider(value=at, maximum=max(2, count), visible=count > 1),
        gr.Image(value=image, visible=not sliding, label=said, alt_text=said, format="png"),
    ]


def _one(pair: Pair, mode: str, at: int) -> Any:
    if mode == DIFFERENCE:
        return difference(_still(pair["a"], at), _still(pair["b"], at), GAIN)
    return _frame(pair["b"] if mode == B else pair["a"], at)


def _frame(path: str, at: int) -> Any:
    """A file as it is, or one of its frames."""
    return _still(path, at) if at else path


def _still(path: str, at: int) -> Image.Image:
    """Frame `at` of a PNG, from 1 on. Frames that are like the one before are not in the file."""
    with Image.open(path) as image:
        image.seek(min(max(1, at), getattr(image, "n_frames", 1)) - 1)
        return image.convert("RGB")
