"""The options of `tenuto` that the pipeline's own call gets; `calls.py` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from .arguments import whole

CALL = "The pipeline's own call"


def _count(name: str, words: str) -> Any:
    """An option that takes a whole number above 0."""
    return Option(name, metavar="N", parser=whole(1), rich_help_panel=CALL, help=words)


Set = Annotated[
    list[str],
    Option(
        "--set", metavar="NAME=VALUE", rich_help_panel=CALL, show_default=False,
        help="Any other keyword of the pipeline's call: JSON or text; @FILE is an image file. May "
        "be given several times.",
    ),
]  # fmt: skip
Image = Annotated[
    Path | None,
    Option("--image", metavar="FILE", rich_help_panel=CALL, help="The image to start from."),
]
Mask = Annotated[
    Path | None,
    Option("--mask", metavar="FILE", rich_help_panel=CALL, help="Where to change it, in white."),
]
Height = Annotated[int | None, _count("--height", "Height in pixels (the model's).")]
Width = Annotated[int | None, _count("--width", "Width in pixels (the model's).")]
Frames = Annotated[int | None, _count("--frames", "Frames of a video (the model's).")]
Without = Annotated[
    str | None,
    Option("--negative", metavar="TEXT", rich_help_panel=CALL, help="What images should not show."),
]
Compile = Annotated[
    bool,
    Option("--compile", help="Compile the denoiser's blocks, which takes a minute or two."),
]
Graphs = Annotated[
    bool | None,
    Option(
        "--graphs/--no-graphs",
        help="Run the denoiser's calls as CUDA graphs where they are faster (on CUDA, they do).",
    ),
]
Prompts = Annotated[
    Path | None,
    Option(
        "--prompt-cache", metavar="FILE",
        help="Keep what the text encoder makes of the prompt in this .safetensors file; where it "
        "is known, no text encoder is loaded.",
    ),
]  # fmt: skip
