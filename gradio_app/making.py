"""The image side of Generate: images are made one after another, shown, and kept in a list."""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from tenuto.errors import Cancelled, TenutoError

from .bench import NO_ARTIFACT, Bench
from .call_fields import given
from .failures import sentence
from .far import Far, meanwhile
from .given import given as or_absent
from .given import whole
from .lora_field import given as loras_given
from .measured import compared, generated
from .speedup_fields import usable
from .view import card
from .viewer import QUIET, Pair, Viewer, show, viewer

IDLE = card("idle", "No image yet.", "Write a prompt and press Generate.")
FULL = "full precision"
MOST_IMAGES = 64  # of one press
KEPT = 24  # in the list
SEEDS = 2**32


@dataclass(frozen=True)
class ImageSide:
    """Its components. made: what the list shows, newest first: a dictionary an image."""

    view: Viewer
    numbers: gr.HTML
    infotext: gr.Textbox
    gallery: gr.Gallery
    made: gr.State

    @property
    def outputs(self) -> list[Any]:
        """What `made_now` fills."""
        view = [self.view.pair, self.numbers, self.infotext, *self.view.outputs]
        return [*view, self.gallery, self.made]


def image_side() -> ImageSide:
    """The components, empty."""
    with gr.Column(scale=3, min_width=320):
        view = viewer("generate", "Image")
        numbers = gr.HTML(IDLE, elem_id="numbers")
        infotext = gr.Textbox(
            label="Settings, as in the PNG", lines=2, interactive=False, visible=False,
            buttons=["copy"], elem_id="infotext",
        )  # fmt: skip
        gallery = gr.Gallery(
            label="Images made on this page: choose one to see it and its numbers again",
            columns=4, height="auto", allow_preview=False, interactive=False, visible=False,
            buttons=[], elem_id="gallery", format="png",
        )  # fmt: skip
    side = ImageSide(view, numbers, infotext, gallery, gr.State([]))
    gallery.select(_again, [side.made, view.mode], side.outputs[:-2], **QUIET)
    return side


def _again(made: list[dict[str, Any]], mode: str, chosen: gr.EventData) -> list[Any]:
    """An image of the list, as it was shown when it was made; a call without a place shows none."""
    place = chosen._data
    index = place.get("index") if isinstance(place, dict) else None
    if type(index) is not int or not 0 <= index < len(made):
        return [gr.skip()] * 8
    one = made[index]
    info = gr.Textbox(one["infotext"], visible=True)
    return [one["pair"], one["numbers"], info, *show(one["pair"], mode)]


def made_now(bench: Bench, *values: Any) -> Iterator[list[Any]]:
    """What a press of Generate shows: updates for the place of progress and the image side.

    Several images have seeds that follow each other; each is shown when it is there.
    """
    model, prompt, seed, steps, guidance, artifact, on, beside, mode, count, made, *rest = values
    speedup, loras, *own = rest
    done, stops = 0, bench.studio.stops
    try:
        wanted = or_absent(count, whole, "The number of images", 1, MOST_IMAGES, absent=1)
        if wanted > 1:
            seed = or_absent(seed, whole, "The seed", 0, 2**53, absent=random.randrange(SEEDS))
        for done in range(wanted):
            if bench.studio.stops != stops:
                raise Cancelled
            far = Far(done + 1, wanted)
            work = partial(
                bench.generate, model, prompt, seed if wanted == 1 else seed + done, steps,
                guidance, artifact if on else NO_ARTIFACT, beside, far.on_call,
                given(bench, model, own), usable(bench, model, artifact, speedup, on), far.on_wait,
                stops=stops, loras=loras_given(bench.places, model, loras),
            )  # fmt: skip
            found = yield from meanwhile(work, partial(_working, far))
            one = _one(bench, found)
            made = [one, *made][:KEPT]
            gallery = gr.Gallery([(x["file"], x["caption"]) for x in made], visible=True)
            info = gr.Textbox(one["infotext"], visible=True)
            shown = [one["pair"], one["numbers"], info, *show(one["pair"], mode), gallery, made]
            yield [gr.skip(), *shown]
    except Cancelled:
        kept = f"{done} of the images are kept." if done else "Nothing was saved."
        yield _said(card("stopped", "Stopped.", kept))
    except TenutoError as error:
        yield _said(card("failed", "It cannot be generated.", str(error)))
    except Exception as error:  # of the model itself: no memory left, say
        traceback.print_exc()
        yield _said(card("failed", "Generating failed.", sentence(error)))


def _working(far: Far) -> list[Any]:
    """How far it is; in the place of the numbers, too, until there are some of this press."""
    return _said(far.card() if far.number == 1 else gr.skip(), far.bar())


def _said(numbers: Any, working: Any = None) -> list[Any]:
    """Updates that change the place of the numbers, and that of progress, and leave the rest."""
    skip = gr.skip()
    return [skip if working is None else working, skip, numbers, *[skip] * 8]


def _one(bench: Bench, found: dict[str, Any]) -> dict[str, Any]:
    """What is shown of an image, and kept for the list."""
    from tenuto.cli.checks import device_of

    pictures, said = found["pictures"], found["numbers"]
    caption = f"seed {found['seed']}"
    if len(pictures) == 2:
        names = [FULL, found["artifact"]]
        pair: Pair = {"a": pictures["full"], "b": pictures["artifact"], "names": names}
        numbers = compared({found["artifact"]: said})
        psnr = (said["psnr_db"] or {}).get("median")
        caption += "" if psnr is None else f", {psnr:.1f} dB"
    else:
        ((which, path),) = pictures.items()
        pair = {"a": path, "names": [FULL if which == "full" else found["artifact"]]}
        device = str(device_of(bench.settings.device))
        numbers = generated(said, found["seconds"], found["steps"], device)
    pair["frames"] = found["frames"]
    file = pictures.get("artifact") or pictures["full"]
    return {
        "pair": pair, "numbers": numbers, "infotext": found["infotext"], "file": file,
        "caption": caption,
    }  # fmt: skip
