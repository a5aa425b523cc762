"""An artifact for other programs: where its file goes, as it is or exported, and the export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tenuto.errors import TenutoError
from tenuto.files import clear_parts

from .given import disk_told, words
from .jobs import Job
from .places import SHIPPED

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
HOSTS = (
    ("In ComfyUI", "Copy {file} into ComfyUI's folder models/tenuto. The node Tenuto Loader has it "
     "beside the model; the nodes come with ComfyUI-Manager, as Tenuto."),
    ("In Forge, Forge Neo, reForge and A1111", "Copy {file} into the folder models/tenuto of the "
     "WebUI. The extension Tenuto has it in its list of artifacts."),
    ("In Python", "tenuto.attach(pipe, {name!r}) of a diffusers pipeline of this model."),
)  # fmt: skip
NO_HOST = (
    "A demo model is for this app and for diffusers: ComfyUI and the WebUIs have none as small."
)


def exported(bench: Bench, name: str, form: str) -> Path:
    """Where an export goes: a file, or a folder for diffusers."""
    stem = name.removeprefix(SHIPPED)
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
