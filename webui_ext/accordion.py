"""The accordion: its fields in the order of the API, and what an infotext fills in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from typing import Any

from tenuto.errors import TenutoError

from . import artifacts, words
from .choices import (
    ARTIFACT,
    CACHES,
    FASTEST,
    HASH,
    KEYS,
    MAIN,
    PASSES,
    PRECISIONS,
    PREDICTED,
    PRESETS,
    VERSION,
    Choices,
    pasted,
)

PLAIN = Choices()
AUTOMATIC = (
    "At speed 2, Auto makes half of the model's calls and forecasts the others: nearly the same "
    "image. Under a sampler that adds noise (Euler a, SDE, LCM) it is Router. Runs need 9 steps. "
    "Start, stop, last step and reuse in a row are limits of Uniform and Router alone."
)
SKIPS = (
    "1 leaves it to the feature cache. Above 1, calls are skipped in its place, as by Auto, but "
    "nothing is reused where a run does not allow that. Without an artifact that has a forecast of "
    "your model, one that ships decides, which was not measured on it."
)
problem: list[str] = []  # why the last infotext was not restored; it stays until Tenuto is on


def build(script: Any) -> list[Any]:
    """The components of the accordion. Labels are keys of users' defaults: never rename them."""
    import gradio as gr
    from modules.ui_components import InputAccordion, ToolButton

    def ident(name: str) -> str:
        return script.elem_id(name)

    def slider(name: str, label: str, low: float, high: float, step: float, **more: Any) -> Any:
        more |= {"value": getattr(PLAIN, name), "label": label, "elem_id": ident(name)}
        return gr.Slider(low, high, step=step, **more)

    with InputAccordion(PLAIN.enabled, label="Tenuto", elem_id=ident("enable")) as enabled:
        with gr.Row():
            buttons = {
                name: gr.Button(name, elem_id=ident(f"preset_{name.lower()}")) for name in PRESETS
            }
        with gr.Row():
            artifact = gr.Dropdown(
                label="Artifact", choices=artifacts.names(), value=PLAIN.artifact,
                elem_id=ident("artifact"),
            )  # fmt: skip
            refresh = ToolButton(value="\u21bb", elem_id=ident("refresh"))  # fonts have it
            precision = gr.Dropdown(
                label="Precision", choices=list(PRECISIONS), value=PLAIN.precision,
                elem_id=ident("precision"),
            )  # fmt: skip
        with gr.Row():
            cache = gr.Radio(
                label="Feature cache", choices=list(CACHES), value=PLAIN.cache,
                elem_id=ident("cache"), info=AUTOMATIC,
            )  # fmt: skip
            speed = slider("speed", "Speed", 1, 8, 0.5)
        with gr.Row():
            start = slider("start", "Start at", 0, 1, 0.05)
            stop = slider("stop", "Stop at", 0, 1, 0.05)
        with gr.Row():
            last = gr.Checkbox(
                PLAIN.last, label="Always compute last step", elem_id=ident("last")
            )  # fmt: skip
            longest = slider("longest", "Max. consecutive reuse", 0, 20, 1)
            passes = gr.Radio(
                label="Passes", choices=list(PASSES), value=PLAIN.passes, elem_id=ident("passes")
            )  # fmt: skip
        speedup = slider("speedup", "Speedup", 1, FASTEST, 0.05, info=SKIPS)
        status = gr.HTML(words.status_html(PLAIN), elem_id=ident("status"))
    parts = [enabled, artifact, precision, cache, speed, start, stop, last, longest, passes]
    parts.append(speedup)
    for component in (artifact, status):  # what they offer changes from start to start
        component.do_not_save_to_config = True
    _wire(gr, parts, buttons, refresh, status)
    script.infotext_fields = paste_fields(parts, status)
    script.paste_field_names = [MAIN, ARTIFACT, HASH, *KEYS.values(), PREDICTED, VERSION]
    return parts


def _wire(gr: Any, parts: list[Any], buttons: Any, refresh: Any, status: Any) -> None:
    """Buttons fill fields, and the status line follows them."""

    def said(*values: Any) -> str:
        with suppress(TenutoError):
            choices = Choices.of(values)
            if choices.enabled:
                problem.clear()
            return words.status_html(choices, " ".join(problem))
        return words.status_html()

    for name, button in buttons.items():
        filled = astuple(PRESETS[name])[2:9]
        button.click(lambda filled=filled: filled, [], parts[2:9], show_progress=False)
    refresh.click(
        lambda: gr.update(choices=artifacts.names(loaded())), [], [parts[1]], show_progress=False
    )
    for component in parts:
        component.change(said, parts, [status], show_progress=False)


def loaded() -> Any:
    """The denoiser of the checkpoint that is loaded; None where there is none yet."""
    from modules import sd_models, shared

    from . import hosts

    data = getattr(sd_models, "model_data", None)
    model = getattr(data, "sd_model", None) if data is not None else shared.sd_model
    try:
        return None if model is None else hosts.denoiser_of(model)
    except TenutoError:
        return None


def paste_fields(parts: list[Any], status: Any) -> list[Any]:
    """What sets each component from an infotext: functions alone, since texts are no flags."""
    from modules.infotext_utils import PasteField

    names = list(Choices.__dataclass_fields__)
    found = [PasteField(parts[0], enabled_from)]
    for name, component in zip(names[1:], parts[1:], strict=True):
        found.append(PasteField(component, _reader(name)))
    return [*found, PasteField(status, _warning)]


def _reader(name: str) -> Callable[[dict[str, Any]], Any]:
    def read(params: dict[str, Any]) -> Any:
        choices, why = restored(params)
        return None if choices is None or why else getattr(choices, name)

    return read


def enabled_from(params: dict[str, Any]) -> bool | None:
    """On where the infotext says so and the artifact is here; never with another artifact."""
    choices, why = restored(params)
    problem[:] = [why] if why else []
    if why:
        _warn(why)
        return False
    if choices is not None:
        return True
    return False if "Steps" in params else None  # of an image that was made without


def restored(params: dict[str, Any]) -> tuple[Choices | None, str]:
    """The choices in an infotext, and why they cannot be restored, if so."""
    try:
        choices = pasted(params)
        if choices is None:
            return None, ""
        mark = artifacts.mark(artifacts.find(choices.artifact))
    except TenutoError as error:
        return None, f"Tenuto stays off. {error}"
    if params.get(HASH) not in (None, mark):
        return None, (
            f"Tenuto stays off. The artifact {choices.artifact!r} here is another file than the "
            "one that made the image."
        )
    return choices, ""


def _warning(params: dict[str, Any]) -> str | None:
    """For the status line, where it stays."""
    choices, why = restored(params)
    if why:
        return words.status_html(warning=why)
    return None if choices is None else words.status_html(choices)


def _warn(text: str) -> None:
    """A message over the page; an API call has no page, where Gradio has none to show."""
    import gradio as gr

    with suppress(Exception):
        gr.Warning(text)
