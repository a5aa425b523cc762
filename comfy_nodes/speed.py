"""The node with one slider: whole calls of a MODEL are skipped and forecast."""

from __future__ import annotations

from typing import Any

from tenuto.runtime import Patches

from .adapter import ComfyUI
from .api import ArtifactType, found_by, io

SKIPS = (
    "1 is off. 2 skips half of the model's calls and computes what they would have answered from "
    "the calls before: about half the time, and nearly the same image. Higher is faster and less "
    "like it. Needs 9 steps or more, and no sampler that adds noise (ancestral, SDE, LCM): else "
    "nothing is skipped, and Tenuto Report says why. "
)
WHOSE = (
    "Without an artifact, a forecast that ships decides, which was not measured on your model: "
    "Tenuto Report has the error that it predicts."
)


def speedup_input(default: float, more: str = "", **options: Any) -> Any:
    """The slider. more: what its tooltip adds."""
    return io.Float.Input(
        "speedup", default=default, min=1.0, max=4.0, step=0.05,
        display_mode=io.NumberDisplay.slider, tooltip=f"{SKIPS}{more}{WHOSE}", **options,
    )  # fmt: skip


def faster(model: Any, artifact: Any, speedup: float) -> io.NodeOutput:
    """The model with calls skipped, by the artifact's forecast or by the one that ships."""
    if speedup <= 1:
        return io.NodeOutput(model)
    return cached(model, Patches(artifact, weights=False, route=False, speedup=speedup))


def cached(model: Any, patches: Patches) -> io.NodeOutput:
    """The model with the cache."""
    return io.NodeOutput(ComfyUI().install(model, patches).handle)


class SpeedUp(io.ComfyNode):
    """Whole calls of a MODEL skipped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """MODEL to MODEL."""
        return io.Schema(
            node_id="Tenuto_SpeedUp",
            **found_by("speed up", "faster", "EasyCache", "TeaCache", "Spectrum", "skip steps"),
            display_name="Tenuto Speed Up",
            category="Tenuto",
            description="Makes sampling faster with one slider, on any model that predicts noise, "
            "v or flow: skips whole calls of the model and forecasts them. No calibration needed; "
            "an artifact with a forecast of this model makes it better. Last before the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model; it stays as it is."),
                speedup_input(2.0),
                ArtifactType.Input("artifact", optional=True, tooltip="One with a forecast."),
            ],
            outputs=[io.Model.Output(tooltip="The faster model.")],
        )

    @classmethod
    def execute(cls, model: Any, speedup: float, artifact: Any = None) -> io.NodeOutput:
        """Raises TenutoError in one sentence if the model can have no forecast."""
        return faster(model, artifact, speedup)
