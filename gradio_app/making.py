"""The image side of Generate: images are made one after another, shown, and kept in a list."""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from tenuto.errors import Cancelled, TenutoError

from .bench import NO_ARTIFACT, Bench
from .call_fields import given
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


def made_now(bench: Bench, progress: gr.Progress, *values: Any) -> Iterator[list[Any]]:
    """What the image side shows after a press of Generate: made, stopped or failed.

    Several images have seeds that follow each other; each is shown when it is there.
    """
    model, prompt, seed, steps, guidance, artifact, on, beside, mode, count, made, *rest = values
    speedup, loras, *own = rest
    done, stops = 0, bench.studio.stops
    skip: list[Any] = [gr.skip()] * 10
    try:
        wanted = or_absent(count, whole, "The number of images", 1, MOST_IMAGES, absent=1)
        if wanted > 1:
            seed = or_absent(seed, whole, "The seed", 0, 2**53, absent=random.randrange(SEEDS))
        for done in range(wanted):
            if bench.studio.stops != stops:
                raise Cancelled
            which = f"Image {done + 1} of {wanted}" if wanted > 1 else "Generating"

            def on_call(now: int, total: int, which: str = which) -> None:
                progress((now, total), desc=which, unit="calls")

            def on_wait(place: int, which: str = which) -> None:
                progress(0, desc=f"{which}: in line, place {place}. It begins by itself")

            progress(0, desc="Loading the model")
            found = bench.generate(
                model, prompt, seed if wanted == 1 else seed + done, steps, guidance,
                artifact if on else NO_ARTIFACT, beside, on_call, given(bench, model, own),
                usable(bench, model, artifact, speedup, on), on_wait, stops=stops,
                loras=loras_given(bench.places, model, loras),
            )  # fmt: skip
            one = _one(bench, found)
            made = [one, *made][:KEPT]
            gallery = gr.Gallery([(x["file"], x["caption"]) for x in made], visible=True)
            info = gr.Textbox(one["infotext"], visible=True)
            yield [one["pair"], one["numbers"], info, *show(one["pair"], mode), gallery, made]
    except Cancelled:
        kept = f"{done} of the images are kept." if done else "Nothing was saved."
        yield [skip[0], card("stopped", "Stopped.", kept), *skip[2:]]
    except TenutoError as error:
        yield [skip[0], card("failed", "It cannot be generated.", str(error)), *skip[2:]]
    except Exception as error:  # of the model itself: no memory left, say
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"[:300]
        yield [skip[0], card("failed", "Generating failed.", said), *skip[2:]]


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
