"""The options of `tenuto export`, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from ..artifact.export import FORMATS, LIBRARIES
from .options import OUTPUT, _choice

To = Annotated[
    str,
    _choice("--to", OUTPUT, f"Which program is to read it: {', '.join(FORMATS)}.", FORMATS, "F"),
]
Out = Annotated[
    Path,
    Option(
        "--out", metavar="FILE", rich_help_panel=OUTPUT,
        help="The file to write: .safetensors, .gguf, or a new folder for diffusers.",
    ),
]  # fmt: skip
Scheme = Annotated[
    str | None,
    Option(
        "--scheme", metavar="S", rich_help_panel=OUTPUT,
        help="How layers inside the blocks are rounded that the artifact has no codes of: a name "
        "that the format knows, such as w8a8 or q8_0.",
    ),
]  # fmt: skip
Library = Annotated[
    str,
    _choice(
        "--library", OUTPUT, "Whose layers a folder for diffusers has: " + ", ".join(LIBRARIES)
        + " (sdnq has convolutions in 8 bits, too).", LIBRARIES, "L",
    ),
]  # fmt: skip
Prefix = Annotated[
    str,
    Option(
        "--prefix", metavar="TEXT", rich_help_panel=OUTPUT,
        help="Before every name of --to comfy: model.diffusion_model. makes it part of a "
        "checkpoint.",
    ),
]  # fmt: skip
Part = Annotated[
    str,
    Option(
        "--part", metavar="NAME", rich_help_panel=OUTPUT,
        help="Which denoiser of several, such as transformer_2 (the main one).",
    ),
]  # fmt: skip
