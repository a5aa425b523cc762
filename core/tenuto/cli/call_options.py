"""The options of `tenuto` that the pipeline's own call gets; `calls.py` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from .arguments import whole

CALL = "The pipeline's own call"

Set = Annotated[
    list[str],
    Option(
        "--set", metavar="NAME=VALUE", rich_help_panel=CALL, show_default=False,
        help="Any other keyword of the pipeline's call: JSON or text; @FILE is an image file. May "
        "be given several times.",
    ),
]  # fmt: skip
Picture = Annotated[
    Path | None,
    Option("--image", metavar="FILE", rich_help_panel=CALL, help="The image to start from."),
]
Mask = Annotated[
    Path | None,
    Option("--mask", metavar="FILE", rich_help_panel=CALL, help="Where to change it, in white."),
]
Height = Annotated[
    int | None,
    Option(
        "--height", metavar="N", parser=whole(1), rich_help_panel=CALL,
        help="Height in pixels (the model's).",
    ),
]  # fmt: skip
Width = Annotated[
    int | None,
    Option(
        "--width", metavar="N", parser=whole(1), rich_help_panel=CALL,
        help="Width in pixels (the model's).",
    ),
]  # fmt: skip
Frames = Annotated[
    int | None,
    Option(
        "--frames", metavar="N", parser=whole(1), rich_help_panel=CALL,
        help="Frames of a video (the model's).",
    ),
]  # fmt: skip
Without = Annotated[
    str | None,
    Option("--negative", metavar="TEXT", rich_help_panel=CALL, help="What images should not show."),
]
