"""`tenuto export`: a model, with what an artifact knows of it, as a file of another program."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..artifact.export import LIBRARIES, check_format, lines_of
from ..artifact.export import export as exported
from ..errors import TenutoError
from ..sampling.loading import check_model, load_denoisers
from .checks import check_file, damage_told, load_artifact
from .console import Answer, Bars

NEXT = {  # what to do with a file
    "comfy": "put {out} into ComfyUI's models/diffusion_models; Load Diffusion Model has it.",
    "gguf": "put {out} into ComfyUI's models/unet; the loader of ComfyUI-GGUF has it.",
    "diffusers": "from_pretrained({out!r}) of the model's class, with {library} installed.",
    "float": "load_state_dict of {out} in Python, or tenuto compare to see what the codes cost.",
}


def export(
    model: str,
    *,
    to: str,
    out: Path,
    artifact: Path | None = None,
    scheme: str | None = None,
    prefix: str = "",
    part: str = "",
    library: str = LIBRARIES[0],
    bars: Bars | None = None,
) -> Answer:
    """Write a file that another program reads by itself, and say what is in it."""
    bars = bars or Bars()
    check_model(model)
    form = check_format(to, out, scheme, prefix, library)
    if form.SUFFIX:
        check_file(out)
    _check_kept(out, Path(model), artifact)
    known = None if artifact is None else load_artifact(artifact)
    pipe = load_denoisers(model)
    with damage_told(artifact):
        report = exported(
            pipe, to, out, artifact=known, scheme=scheme, prefix=prefix, part=part,
            library=library,
            on_progress=bars("Exporting"),
        )  # fmt: skip
    bars.close()
    where = NEXT[to].format(out=shlex.quote(str(out)), library=library)
    return Answer("\n".join(lines_of(report)), report.to_json(), next=where)


def _check_kept(out: Path, model: Path, artifact: Path | None) -> None:
    """TenutoError where `out` would replace what is read."""
    place = out.resolve()
    if artifact is not None and place == artifact.resolve():
        raise TenutoError(f"{out} is the artifact itself: name another file.")
    if place == model.resolve() or (place.exists() and model.resolve() in place.parents):
        raise TenutoError(f"{out} is a file of the model itself: name another one.")
