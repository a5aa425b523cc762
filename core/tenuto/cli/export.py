"""`tenuto export`: a model, with what an artifact knows of it, as a file of another program."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..artifact.export import Report, check_format
from ..artifact.export import export as exported
from ..artifact.export.report import COMPANION
from ..artifact.summary import counted, mib
from ..errors import TenutoError
from ..sampling.loading import check_model, load_denoisers
from .checks import check_file, damage_told, load_artifact
from .console import Answer, Bars

NEXT = {  # what to do with a file
    "comfy": "put {out} into ComfyUI's models/diffusion_models; Load Diffusion Model has it.",
    "gguf": "put {out} into ComfyUI's models/unet; the loader of ComfyUI-GGUF has it.",
    "diffusers": "from_pretrained({out!r}) of the model's class, with torchao installed.",
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
    bars: Bars | None = None,
) -> Answer:
    """Write a file that another program reads by itself, and say what is in it."""
    bars = bars or Bars()
    check_model(model)
    form = check_format(to, out, scheme, prefix)
    if form.SUFFIX:
        check_file(out)
    _check_kept(out, Path(model), artifact)
    known = None if artifact is None else load_artifact(artifact)
    pipe = load_denoisers(model)
    with damage_told(artifact):
        report = exported(
            pipe, to, out, artifact=known, scheme=scheme, prefix=prefix, part=part,
            on_progress=bars("Exporting"),
        )  # fmt: skip
    bars.close()
    where = NEXT[to].format(out=shlex.quote(str(out)))
    return Answer("\n".join(lines_of(report)), report.to_json(), next=where)


def _check_kept(out: Path, model: Path, artifact: Path | None) -> None:
    """TenutoError where `out` would replace what is read."""
    place = out.resolve()
    if artifact is not None and place == artifact.resolve():
        raise TenutoError(f"{out} is the artifact itself: name another file.")
    if place == model.resolve() or (place.exists() and model.resolve() in place.parents):
        raise TenutoError(f"{out} is a file of the model itself: name another one.")


def lines_of(report: Report) -> list[str]:
    """A report as people read it."""
    out, beside = report.files[0], [f for f in report.files if f.name.endswith(COMPANION)]
    found = [f"{out}: {mib(report.after)}; in bf16 it would be {mib(report.before)}."]
    kinds = ", ".join(f"{counted(n, 'layer')} in {kind}" for kind, n in report.kinds.items())
    own = "with the artifact's own codes" if report.kept else "rounded to nearest"
    partly = f"{report.kept} of them " if 0 < report.kept < len(report.layers) else ""
    found.append(f"{kinds}, {partly}{own}; all else in 16 bits or more.")
    if report.worst:
        found.append(f"Farthest from the model's weights: {report.worst}, {report.error:.2%}.")
    found.append(f"Each layer was read back. Read by: {report.host}.")
    found += [f"Left out: {line}" for line in report.dropped]
    found += [f"Note: {line}" for line in report.notes]
    found += [f"Beside it: {path}, with what Tenuto knows of it." for path in beside]
    return found
