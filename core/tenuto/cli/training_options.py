"""The options of `tenuto train-router` that choose a policy and how a router is trained."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from .options import TRAINING

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
