"""MODEL of a command: where it is read, and how the next command names it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..sampling.loras import Lora
from ..sampling.opened import opened
from ..sampling.single_file import pointed
from ..sampling.weight_files import left_out
from .checks import check_kept
from .console import Bars

ENCODERS = "text_encoder"  # begin like this


@dataclass(frozen=True)
class ModelSource:
    """place: what loads it. line: MODEL and its --config, as a command line has them.

    loras: LoRAs that are put on it; with_loras: the line with them.
    """

    place: str
    line: str
    loras: tuple[Lora, ...] = ()
    with_loras: str = ""


def model_source(
    model: str,
    config: str | None,
    bars: Bars,
    loras: Sequence[str] = (),
    out: Path | None = None,
) -> ModelSource:
    """`opened`, with a word on which model lends a single file what it lacks; LoRAs are read.

    loras: each FILE or FILE:WEIGHT. out: what is to be written, which the model must not be.
    """
    if out is not None:
        check_kept(out, model)
    read = tuple(Lora.read(text) for text in loras)
    place = opened(model, config)
    line = shlex.quote(model)
    if config is not None:
        line += f" --config {shlex.quote(config)}"
    single = pointed(Path(place)) if place != model else None
    if single is not None and config is None:
        bars.note(
            f"configurations and tokenizers are those of {lender_name(single.rest)}; --config "
            "takes others."
        )
    lost = set[str]() if single is None else left_out(Path(place)) - left_out(single.rest)
    for name in sorted(n for n in lost if n.startswith(ENCODERS)):
        bars.note(f"{Path(model).name} is used without its {name}, which is not on this machine.")
    with_loras = " ".join([line, *(f"--lora {shlex.quote(text)}" for text in loras)])
    return ModelSource(place, line, read, with_loras)


def lender_name(folder: Path) -> str:
    """A model's folder; of a download its id."""
    parts = folder.parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return "/".join(parts[-3].split("--")[1:])
    return str(folder)
