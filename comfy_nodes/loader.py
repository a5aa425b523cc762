"""The node that loads a model with what Tenuto knows of it: one in place of three.

The host reads the file. Where an artifact has codes of its layers, the float weights are given up
once they are known to be those that the artifact was made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from safetensors import SafetensorError

from tenuto.artifact import Artifact, default_speedup, kernel_of, schedule_of
from tenuto.artifact.export import applicable, exported_facts, read_exported
from tenuto.errors import ModelError, TenutoError
from tenuto.runtime import EXECUTIONS, Patches
from tenuto.text import printable

from .adapter import ComfyUI, Installed
from .api import folded, found_by, io, ui
from .artifacts import about, loaded, missing, names, path_of
from .coded_weights import give_up_, memory_of
from .files import NO_FILE, choices, fingerprint, is_there
from .nodes import about as about_layers
from .speed import speedup_input
from .weights import Weights

FOLDERS = ("diffusion_models", "checkpoints")  # of the host's own loaders
OF_FILE = "none or file's own"
AS_SAID, BY_SLIDER, NOTHING = "as the artifact says", "by speedup", "nothing"
CODES, FLOATS = "codes alone", "codes and float weights"
KEY = "tenuto_loader"


@dataclass(frozen=True)
class Loaded:
    """For *Tenuto Report*: the names of the two files."""

    model: str
    artifact: str | None

    def line(self, denoiser: Any) -> str:
        """What was loaded, and the memory that its weights take now."""
        with_ = "" if self.artifact is None else f" with {self.artifact}"
        return f"Loaded: {self.model}{with_}. {memory_line(denoiser)}"


class Loader(io.ComfyNode):
    """A model file of the host's list, and an artifact or an exported file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Two files in, MODEL out; CLIP and VAE of a checkpoint that has them."""
        return io.Schema(
            node_id="Tenuto_Loader",
            **found_by("load model", "load quantized model", "load diffusion model", "checkpoint"),
            display_name="Tenuto Loader",
            category="Tenuto",
            description="Loads a model with what Tenuto knows of it: an artifact's quantized "
            "layers, in the place of the float weights, and its cache schedule or forecast. Or a "
            "model that Tenuto exported, with the schedule or forecast in it.",
            inputs=[
                io.Combo.Input(
                    "model", options=models(),
                    tooltip="A file of models/diffusion_models or models/checkpoints, as the "
                    "host's own loaders have them; exported ones too.",
                ),
                io.Combo.Input(
                    "artifact", options=artifacts(), default=OF_FILE,
                    tooltip="What calibration made of this model, from models/tenuto. Of an "
                    "exported model: its cache schedule and forecast, which it brings itself.",
                ),
                io.Combo.Input(
                    "skip", options=[AS_SAID, BY_SLIDER, NOTHING], default=AS_SAID,
                    tooltip="What sampling leaves out. As the artifact says: its cache schedule, "
                    "else its forecast at the speedup in the file, else nothing.",
                ),
                speedup_input(2.0, "With skip by speedup. "),
                folded(io.Combo.Input(
                    "weights", options=[CODES, FLOATS], default=CODES, optional=True,
                    tooltip="Of layers with codes. Codes alone take a half to a quarter of the "
                    "memory. With the float weights too, a LoRA is added to these, not to what "
                    "the codes stand for, and the model can be calibrated or quantized again.",
                )),
                folded(io.Combo.Input(
                    "execution", options=[*EXECUTIONS], default="auto", optional=True,
                    tooltip="auto: each layer times int8 and float when it is first used and "
                    "leaves int8 where that is slower, which takes the memory of its float "
                    "weight again. int8: never. float: the codes' values, inputs as they are.",
                )),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the artifact applied."),
                io.Clip.Output(tooltip="The text encoders of a checkpoint; none of other files."),
                io.Vae.Output(tooltip="The VAE of a checkpoint; none of other files."),
                io.String.Output(
                    "report", "report", tooltip="What was loaded, and the memory that it takes."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, model: str, artifact: str) -> bool | str:
        """A sentence where a file is not there."""
        found = is_there(model, model_path, no_model)
        if found is not True or artifact == OF_FILE:
            return found
        return is_there(artifact, path_of, missing)

    @classmethod
    def fingerprint_inputs(cls, model: str, artifact: str, **settings: Any) -> Any:
        """Other files of the same names are others."""
        return fingerprint(model, model_path), fingerprint(artifact, path_of)

    @classmethod
    def execute(
        cls, model: str, artifact: str, skip: str, speedup: float, weights: str = CODES,
        execution: str = "auto",
    ) -> io.NodeOutput:  # fmt: skip
        """Raises TenutoError in one sentence if the files are not there or do not fit."""
        made, said = brought(model) if artifact == OF_FILE else loaded(artifact)
        patches, skipping = asked(made, skip, speedup, execution)
        found, clip, vae = read(model)
        lines = [*said, "Skips nothing." if skipping is None else f"Skips: {skipping}."]
        if patches is not None:
            installed = ComfyUI().install(found, patches)
            lines = [*layers_lines(installed, found, weights == CODES), *lines]
            found = installed.handle
        name = None if made is None else (model if artifact == OF_FILE else artifact)
        found.set_attachments(KEY, Loaded(model, None if name == model else name))
        kind = type(found.model.model_config).__name__
        lines = [f"{model}: {kind}", *lines, memory_line(found.model.diffusion_model)]
        text = "\n".join(lines)
        return io.NodeOutput(found, clip, vae, text, ui=ui.PreviewText(text))


# --- the two files --------------------------------------------------------------------------------


def models() -> list[str]:
    """The files of both folders, with the folder in front."""
    return choices(
        [f"{folder}/{n}" for folder in FOLDERS for n in folder_paths.get_filename_list(folder)]
    )


def artifacts() -> list[str]:
    """No artifact, or one of those that Load Tenuto Artifact has."""
    return [OF_FILE, *(name for name in names() if name != NO_FILE)]


def model_path(name: str) -> str | None:
    """The file that the list calls `name`; None where there is none, or a name leads out."""
    folder, _, inner = name.partition("/")
    path = folder_paths.get_full_path(folder, inner) if folder in FOLDERS else None
    return path if path is not None and Path(path).is_file() else None


def no_model(name: str) -> str:
    """One sentence on a model that is not there."""
    where = " or ".join(f"models/{folder}" for folder in FOLDERS)
    if name == NO_FILE:
        return f"There is no file in {where} yet: put a model there, and press R."
    return f"There is no model called {printable(name)} in {where}."


def brought(model: str) -> tuple[Artifact | None, list[str]]:
    """What an exported model brings along, and what it is; nothing of any other file."""
    path = model_path(model)
    if path is None:
        raise TenutoError(no_model(model))
    facts = exported_facts(path)
    if facts is None:
        return None, []
    if not applicable(facts):
        return None, [about(facts)]
    facts, found = read_exported(path)
    return found, [about(facts)]


def read(model: str) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) by the host's own loaders; the latter None where the file has none.

    ModelError in one sentence where the host cannot read it.
    """
    path = model_path(model)
    if path is None:
        raise TenutoError(no_model(model))
    try:
        if model.startswith(f"{FOLDERS[0]}/"):
            return comfy.sd.load_diffusion_model(path), None, None
        embeddings = folder_paths.get_folder_paths("embeddings")
        found = comfy.sd.load_checkpoint_guess_config(path, embedding_directory=embeddings)
        return found[:3]
    except (RuntimeError, ValueError, OSError, KeyError, SafetensorError) as error:
        said = str(error).partition("\n")[0].removeprefix("ERROR: ").replace(path, model)
        raise ModelError(
            f"ComfyUI cannot load {printable(model)}: {printable(said, 200)}."
        ) from error


# --- what is applied ------------------------------------------------------------------------------


def asked(
    artifact: Artifact | None, skip: str, speedup: float, execution: str
) -> tuple[Patches | None, str | None]:
    """(what is put in, or None for nothing; what is skipped, in words)."""
    own = None if artifact is None else default_speedup(artifact)
    if skip == BY_SLIDER and speedup > 1:
        shipped = artifact is None or kernel_of(artifact) is None
        whose = "the forecast that ships, not measured on this model" if shipped else "its forecast"
        patches = Patches(artifact, route=False, speedup=speedup, execution=execution)
        return patches, f"calls of the model, {speedup:g} times fewer, by {whose}"
    if artifact is None:
        return None, None
    schedule = schedule_of(artifact) if skip == AS_SAID else None
    if schedule is not None:
        said = f"{schedule.reuse_ratio:.0%} of the branches' evaluations, by its cache schedule"
        return Patches(artifact, execution=execution), said
    if skip == AS_SAID and own is not None and own > 1:
        patches = Patches(artifact, route=False, speedup=own, execution=execution)
        return patches, f"calls of the model, {own:g} times fewer, by its forecast"
    return Patches(artifact, route=False, execution=execution), None


def layers_lines(installed: Installed, plain: Any, codes: bool) -> list[str]:
    """What of the layers is quantized. codes: their float weights are given up."""
    part = next((part for part in installed.parts if isinstance(part, Weights)), None)
    if part is None:
        return []
    line = about_layers(part.plan, plain)
    if codes:
        give_up_(plain.model.diffusion_model, part.plan)
    return [line]


def memory_line(denoiser: Any) -> str:
    """The memory that the weights take."""
    taken, wide = memory_of(denoiser)
    saved = f", in float {wide / 2**30:.3g} GiB" if taken < wide else ""
    return f"Its weights take {taken / 2**30:.3g} GiB{saved}."
