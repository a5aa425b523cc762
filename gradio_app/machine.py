"""What the machine has left: a line above the tabs that is read anew every few seconds."""

from __future__ import annotations

from html import escape

import gradio as gr

from tenuto.calibration.check.report import gib

from .bench import Bench
from .view import counted
from .viewer import QUIET

EVERY = 5  # seconds


def machine(bench: Bench) -> None:
    """The component, and the timer that reads it anew."""

    def now() -> str:
        return line(bench.settings.device)

    said = gr.HTML(now(), padding=False, elem_id="machine")
    timer = gr.Timer(EVERY)
    timer.tick(now, None, said, **QUIET)


def line(device: str | None) -> str:
    """Where it computes and how much memory is free there, and beside a GPU in the machine."""
    import torch

    from tenuto.calibration.check.estimates import free_memory
    from tenuto.cli.checks import device_of

    place, said = device_of(device), list[str]()
    if place.type == "cuda":
        free, whole = torch.cuda.mem_get_info(place)
        said.append(f"{torch.cuda.get_device_name(place)}: {gib(free)} of {gib(whole)} free")
    else:
        said.append(
            f"{place.type.upper()}, {counted(torch.get_num_threads(), 'thread', 'threads')}"
        )
    host = free_memory(torch.device("cpu"))
    if host is not None:
        said.append(f"{gib(host)} of memory free")
    return f'<p class="tenuto-small tenuto-machine">{escape(" · ".join(said))}</p>'
