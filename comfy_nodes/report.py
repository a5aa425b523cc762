"""What the last sampling run of a MODEL computed and what it reused, in words and as an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenuto.artifact import StepMap
from tenuto.artifact.panels import cells
from tenuto.artifact.plots import available, image, map_figure
from tenuto.runtime import DENSE

from .api import found_by, io, ui
from .cache import Cache, Run
from .loader import KEY as LOADED
from .own_formats import own_formats, said
from .weights import Weights

SIDE = 768  # pixels of a map without names, about
NOTHING = "Off: this model carries nothing of Tenuto's."


class Report(io.ComfyNode):
    """An output node: it runs after the sampler whose latent it takes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """MODEL and the latent that was sampled with it."""
        return io.Schema(
            node_id="Tenuto_Report",
            **found_by("report", "cache report", "timing"),
            display_name="Tenuto Report",
            category="Tenuto",
            description="What the last run computed and what it reused, step by step.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the sampler used."),
                io.Latent.Input("samples", tooltip="What the sampler made; it waits for it."),
            ],
            outputs=[
                io.String.Output("text", "text"),
                io.Image.Output("map", "map", tooltip="Steps along x, branches along y."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model: Any = None, samples: Any = None) -> float:
        """The report is of the last run, so that it is read anew each time: NaN never repeats."""
        return float("nan")

    @classmethod
    def execute(cls, model: Any, samples: Any) -> io.NodeOutput:
        """Words and image; one pixel where nothing was reused."""
        weights, cache = (model.get_attachment(part.key) for part in (Weights, Cache))
        run = cache.last if cache is not None else None
        lines = [NOTHING] if weights is None and cache is None else []
        file = model.get_attachment(LOADED)
        lines += [] if file is None else [file.line(model.model.diffusion_model)]
        own = own_formats(model.model.diffusion_model)
        lines += [f"Quantized by ComfyUI itself: {said(own.values())}"] if own else []
        lines += [] if weights is None else [weights_line(weights)]
        lines += [] if cache is None else cache_lines(run)
        text = "\n".join(lines)
        shown = torch.zeros(1, 64, 64, 3) if run is None else heat_map(run)
        return io.NodeOutput(text, shown, ui=ui.PreviewText(text).as_dict() | lists(weights, run))


def lists(weights: Weights | None, run: Run | None) -> dict[str, Any]:
    """The last run for programs that read the server's history.

    layers: names of the quantized ones. cells: [branch, times computed, times reused].
    """
    layers = [] if weights is None else weights.ran
    counts = (
        [] if run is None else zip(run.names, run.computed.sum(0), run.reused.sum(0), strict=True)
    )
    return {"layers": layers, "cells": [[name, int(c), int(h)] for name, c, h in counts]}


def weights_line(weights: Weights) -> str:
    """How the quantized layers computed in the last run."""
    done = ", ".join(f"{name} {count}" for name, count in sorted(weights.how.items()))
    line = f"Quantized layers: {len(weights.plan.schemes)} ({done or 'none has run'})"
    timed = weights.plan.options["wanted"] == "auto" and weights.how.get(DENSE)
    return f"{line}: int8 is slower here for {timed} of them" if timed else line


def cache_lines(run: Run | None) -> list[str]:
    """What was computed, what was reused or forecast, and why not; the time of the calls."""
    if run is None:
        return ["Cache: no run yet"]
    computed, reused = int(run.computed.sum()), int(run.reused.sum())
    total = computed + reused
    share = reused / total if total else 0.0
    what = f"branch evaluations reused ({share:.0%})"
    if run.forecast:
        what = f"calls of the model skipped and forecast ({share:.0%}), {computed} computed"
    steps = [f"{s:.3f}" for s in run.seconds]
    return [
        f"Cache: {reused} of {total} {what}",
        *filter(None, [run.why, run.said]),
        f"Denoiser calls: {run.calls} in {len(run.timesteps)} steps",
        f"Seconds by step: {' '.join(steps)}",
    ]


def heat_map(run: Run) -> Tensor:
    """(1, H, W, 3) in [0, 1]: a cell is computed, or reused at every one of its evaluations.

    With names and axes where the host has matplotlib, else the cells alone.
    """
    route = StepMap(run.reused == 0, run.timesteps, run.names, "last run")
    if not available():
        small = cells(route)
        size = max(1, SIDE // max(small.shape))
        pixels = small.repeat_interleave(size, 0).repeat_interleave(size, 1)
    else:
        plot = image(map_figure(route, "Tenuto: the last run", cache_lines(run)[0]))
        pixels = torch.from_numpy(np.array(plot))
    return pixels.float()[None] / 255
