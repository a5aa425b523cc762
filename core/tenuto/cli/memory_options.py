"""The options of `tenuto quantize` for large models: what may be in memory."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from .arguments import size
from .options import CALIBRATION

LowMemory = Annotated[
    bool | None,
    Option(
        "--low-memory/--no-low-memory", rich_help_panel=CALIBRATION, show_default=False,
        help="Leave the denoiser on disk and read it block by block, which is slower (where the "
        "model is large for the memory that is free).",
    ),
]  # fmt: skip
MaxMemory = Annotated[
    int | None,
    Option(
        "--max-memory", metavar="SIZE", parser=size, rich_help_panel=CALIBRATION,
        help="Memory that quantizing may take, such as 10GiB: with --low-memory where that is "
        "needed, else one sentence says what it takes.",
    ),
]  # fmt: skip
