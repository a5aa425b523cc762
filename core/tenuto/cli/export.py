"""`tenuto export`: a model, with what an artifact knows of it, as a file of another program."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..artifact.export import LIBRARIES, check_format, lines_of
from ..artifact.export import export as exported
from ..errors import TenutoError
from ..sampling.loading import load_denoisers
from .checks import check_file, check_kept, damage_told, load_artifact
from .console import Answer, Bars
from .model_source import model_source

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
    config: str | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Write a file that another program reads by itself, and say what is in it."""
    bars = bars or Bars()
    source = model_source(model, config, bars)
    form = check_format(to, out, scheme, prefix, library)
    if form.SUFFIX:
        check_file(out)
    if artifact is not None and out.resolve() == artifact.resolve():
        raise TenutoError(f"{out} is the artifact itself: name another file.")
    check_kept(out, model)
    known = None if artifact is None else load_artifact(artifact)
    pipe = load_denoisers(source.place)
    with damage_told(artifact):
        report = exported(
            pipe, to, out, artifact=known, scheme=scheme, prefix=prefix, part=part,
            library=library,
            on_progress=bars("Exporting"),
        )  # fmt: skip
    bars.close()
    where = NEXT[to].format(out=shlex.quote(str(out)), library=library)
    return Answer("\n".join(lines_of(report)), report.to_json(), next=where)
