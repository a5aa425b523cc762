"""An artifact for other programs: where its file goes, as it is or exported, and the export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tenuto.errors import TenutoError
from tenuto.files import clear_parts

from .given import disk_told, words
from .jobs import Job

if TYPE_CHECKING:
    from .bench import Bench

AS_IT_IS = "artifact"
FORMS = {
    AS_IT_IS: "The artifact, for Tenuto in ComfyUI, Forge, A1111 and diffusers",
    "comfy": "A model file for ComfyUI or Forge Neo, without Tenuto",
    "gguf": "A GGUF file for ComfyUI-GGUF or diffusers, without Tenuto",
    "diffusers": "A folder for diffusers, without Tenuto",
}
ENDINGS = {"comfy": ".safetensors", "gguf": ".gguf", "diffusers": ""}
COMFY, FORGE = "In ComfyUI", "In Forge, Forge Neo, reForge and A1111"
HOW = {  # in each host, by form; `file` stands for the path
    AS_IT_IS: {
        COMFY: "Copy the file into ComfyUI's folder models/tenuto. The node Tenuto Loader has it "
        "beside the model; the nodes come with ComfyUI-Manager, as Tenuto.",
        FORGE: "Copy the file into the folder models/tenuto of the WebUI. The extension Tenuto has "
        "it in its list of artifacts.",
    },
    "comfy": {
        COMFY: "Copy the file into ComfyUI's folder models/diffusion_models. The node Load "
        "Diffusion Model has it; load the text encoders and the VAE beside it.",
        "In Forge Neo": "Copy the file into the folder models/Stable-diffusion. It is in the list "
        "of checkpoints; choose the text encoders and the VAE beside it.",
    },
    "gguf": {
        COMFY: "Copy the file into ComfyUI's folder models/unet. The node Unet Loader (GGUF) of "
        "ComfyUI-GGUF has it; load the text encoders and the VAE beside it.",
    },
    "diffusers": {},
}  # fmt: skip
NEEDS = {  # beside the lines of Python
    AS_IT_IS: "With Tenuto, by the lines below.",
    "gguf": "By the lines below, after pip install gguf.",
    "diffusers": "By the lines below, after pip install torchao.",
}
WHERE = {
    True: "The file is {}.",
    False: "Press Export to write {}. What is there already is not replaced.",
}
NO_HOST = (
    "A demo model is for this app and for diffusers: ComfyUI and the WebUIs have none as small."
)
NO_EXPORT = "The artifact is a file already, and needs no export: choose another format for that."
NO_ARTIFACT = "There is no artifact yet.", "Calibrate a model, or add an artifact in Generate."


def exported(bench: Bench, name: str, form: str) -> Path:
    """Where an export goes: a file, or a folder for diffusers. ArtifactError if there is none."""
    stem = bench.places.artifact(name).stem
    return bench.places.out / "exports" / f"{stem}-{form}{ENDINGS[form]}"


@disk_told()
def begun(bench: Bench, model: str, artifact: str, to: str) -> Job:
    """Start an export; TenutoError if it is refused. to: one of `ENDINGS`."""
    to = words(to, "What it is for", 100)
    if to not in ENDINGS:
        raise TenutoError(f"An artifact is exported for one of {', '.join(ENDINGS)}.")
    place, file = bench.places.model(model), bench.places.artifact(artifact)
    out = exported(bench, artifact, to)
    if out.exists():
        raise TenutoError(f"There is {out.name} in the folder exports already: remove it first.")
    bench.desk.check_free(str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    request = {
        "model": place, "shown_model": model, "artifact": str(file), "shown_artifact": artifact,
        "to": to, "out": str(out),
    }  # fmt: skip
    job = Job("export", request, out.with_name(f"{out.name}.log"))
    return bench.desk.start(job, over)


def over(job: Job) -> None:
    """What a worker that was ended left half written goes; so does the log of what was made."""
    clear_parts(Path(job.request["out"]))
    if job.result:
        job.log.unlink(missing_ok=True)
