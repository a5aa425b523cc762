"""An artifact's model as files that other programs read by themselves: one format a file.

A format is a module here with `ABOUT`, `SUFFIX` (of its files; "" for a folder), `SCHEMES` (what
layers without codes may be given), `PREFIXED` where names may have a prefix, `keys_of(denoiser)`
(these names), `check(plan, settings)` and `write(plan, out, settings, on_progress) -> Report`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import TenutoError
from ...progress import Shown, shown
from ...resources import found
from ..artifact import Artifact
from .beside import applicable, companion, exported_facts, read_companion, read_exported
from .plan import Plan, Settings, planned
from .report import COMPANION, Report, lines_of
from .size import size_note

__all__ = [
    "COMPANION",
    "FORMATS",
    "LIBRARIES",
    "Plan",
    "Report",
    "Settings",
    "applicable",
    "check_format",
    "companion",
    "export",
    "exported_facts",
    "formats",
    "lines_of",
    "read_companion",
    "read_exported",
]


PREFIX = re.compile(r"(?:\w+\.)+", re.ASCII)


def formats() -> dict[str, ModuleType]:
    """Every format by the name of its file."""
    return {name: module for name, module in found(__name__).items() if hasattr(module, "SCHEMES")}


FORMATS = ("comfy", "diffusers", "float", "gguf")  # as `--to` names them: the files here
LIBRARIES = ("torchao", "sdnq")  # whose layers a folder for diffusers may have


def check_format(
    to: str,
    out: str | Path,
    scheme: str | None = None,
    prefix: str = "",
    library: str = LIBRARIES[0],
) -> ModuleType:
    """The module of a format; TenutoError where it does not go with what is asked for."""
    known = formats()
    if to not in known:
        raise TenutoError(f"Unknown format {to!r}: choose one of {', '.join(known)}.")
    form = known[to]
    if scheme is not None and scheme not in form.SCHEMES:
        choice = f"choose one of {', '.join(form.SCHEMES)}" if form.SCHEMES else "it takes none"
        raise TenutoError(f"The format {to} has no scheme {scheme!r}: {choice}.")
    end, files = Path(out).suffix.lower(), {other.SUFFIX for other in known.values()} - {""}
    if end != form.SUFFIX if form.SUFFIX else end in files:
        said = f"a file that ends in {form.SUFFIX}" if form.SUFFIX else "a folder"
        raise TenutoError(f"The format {to} is {said}, and {Path(out).name} is none.")
    if prefix and not (getattr(form, "PREFIXED", False) and PREFIX.fullmatch(prefix)):
        raise TenutoError(
            "A prefix is for --to comfy alone, and made of words with a dot after each."
        )
    if library not in LIBRARIES or (library != LIBRARIES[0] and to != "diffusers"):
        raise TenutoError(
            f"A library is for --to diffusers alone, and one of {', '.join(LIBRARIES)}."
        )
    return form


def export(
    model: Any,
    to: str,
    out: str | Path,
    *,
    artifact: Artifact | str | Path | None = None,
    scheme: str | None = None,
    prefix: str = "",
    part: str = "",
    library: str = LIBRARIES[0],
    inputs: Mapping[str, float] | None = None,
    on_progress: Shown = True,
) -> Report:
    """Write the denoiser of `model` as other programs read it; the file is whole or not there.

    model: a diffusers pipeline or denoiser, whose weights may be on disk. to: one of `FORMATS`.
    artifact: whose codes are written where the format has such ones, and whose cache schedule
    travels along. scheme: of the layers inside the blocks that have no codes, rounded to nearest.
    prefix: before every name ("model.diffusion_model." for a checkpoint). part: which denoiser of
    several, as the pipeline calls it. library: of `LIBRARIES`, whose layers a folder for diffusers
    has. inputs: layer -> the largest size of its inputs, for fp8.
    Every layer is read back and compared. TenutoError says what cannot be exported. on_progress:
    is called with (done, total, note); True: a bar on a terminal or in a notebook; None or False:
    nothing.
    """
    form = check_format(to, out, scheme, prefix, library)
    known = None if artifact is None else Artifact.of(artifact)
    plan = planned(model, form.keys_of, known, part)
    settings = Settings(scheme, prefix, inputs or {}, library)
    form.check(plan, settings)
    try:
        with shown(on_progress, "Exporting") as told:
            report = form.write(plan, Path(out), settings, told)
    except OSError as error:
        raise TenutoError(f"Cannot write {out}: {error.strerror or error}.") from error
    if form.SCHEMES:  # else it is to be as large
        report.notes += filter(None, [size_note(report)])
    return report
