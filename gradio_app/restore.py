"""What is used less often in Generate: settings out of an image, an artifact from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from tenuto.errors import TenutoError
from tenuto.text import printable

from .answers import filling
from .bench import Bench
from .call import as_fields
from .call_fields import filled
from .fields import artifact_choices, shown_number
from .folders import added
from .guard import drop
from .loras import there as loras_there
from .pictures import restored
from .speedup import MOST
from .speedup_fields import OFF
from .view import card, counted
from .viewer import QUIET

NAMES = ("prompt", "seed", "steps", "guidance", "model", "artifact", "speedup", "loras")
FIELDS = 17  # those of `NAMES`, the model that was seen last, the pipeline's own


def aside(
    bench: Bench, model: gr.Dropdown, artifact: gr.Dropdown, fields: list[Any], filled: list[Any]
) -> gr.HTML:
    """The components. fields: what is restored. filled: what an artifact's choice fills.

    Returns what is said of what was added or restored.
    """
    with gr.Accordion("Restore settings, add an artifact or a folder of models", open=False):
        dropped = gr.File(
            label="Drop a PNG: its settings come back", file_types=[".png"], height=110,
            elem_id="restore",
        )  # fmt: skip
        upload = gr.File(
            label="Add an artifact to the output folder", file_types=[".safetensors"], height=110,
            elem_id="add-artifact",
        )  # fmt: skip
        folder = gr.Textbox(
            "", label="Add a folder with models in diffusers format or single files", max_lines=1,
            placeholder="its path on this machine", elem_id="add-folder",
        )  # fmt: skip
        add = gr.Button("Add the folder", size="sm", elem_id="add-folder-now")
        said = gr.HTML("", elem_id="aside-said")
    gr.on(
        [add.click, folder.submit], lambda name: _folder(bench, name), folder, [said, model],
        **QUIET,
    )  # fmt: skip
    places = {field.elem_id: field for field in (*fields, *filled) if field.elem_id}
    filling(
        dropped.upload, lambda path: _restored(bench, path), dropped, [dropped, said, *fields],
        [*places.values()], **QUIET,
    )  # fmt: skip
    filling(
        upload.upload, lambda path, kind: _added(bench, path, kind), [upload, model],
        [upload, said, artifact], filled, **QUIET,
    )  # fmt: skip
    return said


def _restored(bench: Bench, path: str | None) -> list[Any]:
    nothing: list[Any] = [gr.skip()] * FIELDS
    if path is None:
        return [None, "", *nothing]
    try:
        found = restored(bench.places, path)
    except TenutoError as error:
        return [None, card("failed", f"{Path(path).name}: nothing restored.", str(error)), *nothing]
    finally:
        drop(Path(path))
    call = found.pop("call", {})
    loras, missing = loras_there(bench.places, found.pop("loras", ""))
    own = as_fields(call, bench.places.inputs)
    there = [name.replace("_", " ") for name in call if name not in own.lost]
    said = ", ".join([*found, *["LoRAs"] * bool(loras), *there])
    said += "." if "model" in found else ". Its model is not here."
    said += f" Choose again: {', '.join(own.lost.values())}." if own.lost else ""
    said += f" Not here: {printable(', '.join(missing))}." if missing else ""
    found |= {"loras": loras}
    found["guidance"] = shown_number(found.get("guidance"))
    values = [found.get(name, gr.skip()) for name in NAMES]
    faster = found.get("speedup", OFF)
    values[6] = gr.Slider(value=min(faster, MOST), interactive=True)
    said += f" It was made at a speedup of {faster:g}." if faster > MOST else ""
    if "model" in found:
        values[5] = gr.Dropdown(
            choices=artifact_choices(bench, found["model"]), value=found.get("artifact", "")
        )
    chosen = [found["model"], found.get("artifact", "")] if "model" in found else gr.skip()
    return [None, card("done", "Restored.", said), *values, chosen, *filled(own)]


def _added(bench: Bench, path: str | None, model: str) -> list[Any]:
    if path is None:
        return [None, "", gr.skip()]
    try:
        name = bench.added(path, path)
    except TenutoError as error:
        said = card("failed", f"{Path(path).name} is not added.", str(error))
        return [None, said, gr.skip()]
    finally:
        drop(Path(path))
    new = gr.Dropdown(choices=artifact_choices(bench, model), value=name)
    return [None, card("done", "Added.", f"{name} is chosen."), new]


def _folder(bench: Bench, name: str) -> list[Any]:
    """The models that there are with those of another folder; other tabs have them when loaded."""
    try:
        count = added(bench, name)
    except TenutoError as error:
        return [card("failed", "The folder is not added.", str(error)), gr.skip()]
    said = (
        f"{counted(count, 'model', 'models')} can be chosen by now; the other tabs have them, too."
    )
    return [card("done", "Added.", said), gr.Dropdown(choices=bench.places.models())]
