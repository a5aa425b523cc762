"""The options of `tenuto train-router`: how much to reuse, by which policy, and the training."""

from __future__ import annotations

import math
from typing import Annotated

from typer import Option

from .arguments import real, whole

TRAINING = "Training"

Speedup = Annotated[
    float | None,
    Option(
        "--speedup", metavar="X", parser=real(1, math.inf, True), rich_help_panel=TRAINING,
        help="Reduce the denoiser's work by this factor; not together with --reuse.",
    ),
]  # fmt: skip
Whole = Annotated[
    bool,
    Option(
        "--whole", rich_help_panel=TRAINING,
        help="Reuse whole calls of the denoiser instead of its branches.",
    ),
]  # fmt: skip
Reuse = Annotated[
    float | None,
    Option(
        "--reuse", metavar="R", parser=real(0, 1, True), rich_help_panel=TRAINING,
        help="Share of the branches' work to reuse, above 0 and below 1 (0.3).",
    ),
]  # fmt: skip
Iterations = Annotated[
    int | None,
    Option(
        "--iterations", metavar="N", parser=whole(1), rich_help_panel=TRAINING,
        help="Training iterations (the preset's).",
    ),
]  # fmt: skip
Policy = Annotated[
    str | None,
    Option(
        "--policy", metavar="NAME", rich_help_panel=TRAINING,
        help="This cache policy alone, such as taylorseer; the best of all without it.",
    ),
]  # fmt: skip
Weighting = Annotated[
    str | None,
    Option(
        "--weighting", metavar="RULE", rich_help_panel=TRAINING,
        help="How the router weighs steps: gain, paper or code (gain).",
    ),
]  # fmt: skip
