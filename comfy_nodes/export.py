"""A MODEL, with what an artifact knows of it, as a file that this host and others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from tenuto.artifact.export import export, exported_facts, formats, lines_of
from tenuto.errors import TenutoError
from tenuto.model import names_in_host

from .api import ArtifactType, found_by, io, ui
from .artifacts import WRITTEN
from .calibration import NAME
from .own_formats import check_plain
from .weights import Weights, patched

FORMATS = ("comfy", "gguf")  # in the host's own names
FROM_ARTIFACT = "from artifact"
SCHEMES = {f"{form}: {scheme}": (form, scheme) for form in FORMATS
           for scheme in formats()[form].SCHEMES}  # fmt: skip
KEPT = {f"{form}: {FROM_ARTIFACT}": (form, None) for form in FORMATS}


class Export(io.ComfyNode):
    """An output node: it writes output/diffusion_models/NAME.safetensors or NAME.gguf."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """MODEL and an artifact of it."""
        return io.Schema(
            node_id="Tenuto_Export",
            **found_by("export", "save quantized model", "GGUF", "comfy_quant"),
            display_name="Tenuto Export",
            category="Tenuto",
            description="Writes the model with the codes of an artifact as a file that ComfyUI "
            "loads by itself (comfy) or the loader of ComfyUI-GGUF (gguf), to "
            "output/diffusion_models. Its cache schedule and forecast go along.",
            inputs=[
                io.Model.Input("model", tooltip="The model itself: without LoRA, not quantized."),
                io.String.Input("name", default="my-model", tooltip="Of the file, without an end."),
                io.Combo.Input(
                    "scheme", options=[*KEPT, *SCHEMES], default=next(iter(KEPT)),
                    tooltip="Which file, and what layers get that have no codes: none stay in 16 "
                    "bits (from artifact), or all inside blocks are rounded to nearest.",
                ),
                ArtifactType.Input(
                    "artifact", optional=True, tooltip="Calibrated codes for this model."
                ),
            ],
            outputs=[io.String.Output("report", "report", tooltip="What was written, and how.")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        """A sentence where the name would lead out of the folder."""
        if NAME.fullmatch(name) is None:
            return "The name of a model has letters, digits, dots, hyphens and underscores."
        return True

    @classmethod
    def execute(cls, model: Any, name: str, scheme: str, artifact: Any = None) -> io.NodeOutput:
        """Raises TenutoError in one sentence if it cannot be written; no file is left then."""
        form, rounded = (KEPT | SCHEMES)[scheme]
        if artifact is None and rounded is None:
            raise TenutoError("Connect an artifact, or choose a scheme to round to.")
        check(model)
        out = place_of(name, formats()[form].SUFFIX)
        comfy.model_management.unload_all_models()  # no LoRA of another clone is in the weights
        bar = comfy.utils.ProgressBar(1)

        def on_progress(done: int, total: int, note: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        with torch.inference_mode(False), torch.no_grad():
            report = export(
                model.model.diffusion_model, form, out, artifact=artifact, scheme=rounded,
                on_progress=on_progress,
            )  # fmt: skip
        text = "\n".join(lines_of(report)).replace(f"{out.parent}/", "")
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def check(model: Any) -> None:
    """TenutoError where the MODEL is not one that could be exported as it is."""
    if names_in_host(model.model.diffusion_model) is None:
        kind = type(model.model.diffusion_model).__name__
        raise TenutoError(f"Tenuto has no names for the parts of a {kind} in other programs yet.")
    if patched(model):
        raise TenutoError(
            "Export the model itself: save it with the LoRA merged (Save Checkpoint), and load "
            "that, or put LoRA loaders after the exported file."
        )
    if model.get_attachment(Weights.key) is not None:
        raise TenutoError("Export the model itself: without Tenuto Quantize Model before it.")
    check_plain(model.model.diffusion_model)


def place_of(name: str, suffix: str) -> Path:
    """The file in output/diffusion_models; TenutoError where another one is there already."""
    out = Path(folder_paths.get_output_directory()) / WRITTEN / f"{name}{suffix}"
    if out.exists() and exported_facts(out) is None:
        raise TenutoError(f"There is a {out.name} already that Tenuto did not export: rename it.")
    return out
