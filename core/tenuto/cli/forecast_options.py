"""The options of `tenuto` that say how many calls of the denoiser a forecast skips."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Option

from .arguments import real, speedup

FORECAST = "Skipped calls"

SkipCalls = Annotated[
    Any,
    Option(
        "--speedup", metavar="X", parser=speedup, show_default=False,
        help="Skip denoiser calls by a forecast, the artifact's or the shipped one: 2 skips half "
        "of them, auto as many as are predicted safe, 1 none (the artifact's default).",
    ),
]  # fmt: skip
SkipByDefault = Annotated[
    Any,
    Option(
        "--speedup", metavar="X", parser=speedup, rich_help_panel=FORECAST, show_default=False,
        help="The speedup of the artifact's forecast where nobody says one: 2 skips half of the "
        "calls, auto as many as are predicted safe (none are skipped).",
    ),
]  # fmt: skip
ReuseByDefault = Annotated[
    float | None,
    Option(
        "--reuse", metavar="R", parser=real(0, 1), rich_help_panel=FORECAST,
        help="The same as a share of the calls to skip, in place of --speedup.",
    ),
]  # fmt: skip
UnderCache = Annotated[
    bool,
    Option(
        "--under-cache", rich_help_panel=FORECAST,
        help="Calibrate on the calls that are left at --speedup, each step by what it counts.",
    ),
]  # fmt: skip
Measure = Annotated[
    bool | None,
    Option(
        "--measure/--no-measure", rich_help_panel=FORECAST, show_default=False,
        help="Measure the forecast on four images (where that takes about a minute at most).",
    ),
]  # fmt: skip
