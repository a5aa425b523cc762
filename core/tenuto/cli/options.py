"""The options of `tenuto`, each declared once: its flag, its type and its help.

Their defaults are those of the functions in `commands.py`; a test compares them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from ..numerics import known
from .arguments import real, text, whole

QUANTIZATION, CALIBRATION = "Quantization", "Calibration"
SAMPLING, OUTPUT = "Sampling", "Output"
SCHEMES = tuple(known())


def _choice(flag: str, panel: str, help: str, names: tuple[str, ...], metavar: str) -> Any:
    """An option whose names are completed by the shell, and checked by the library."""
    return Option(
        flag, metavar=metavar, help=help, rich_help_panel=panel, autocompletion=lambda: list(names)
    )


OtherPrompts = Annotated[
    Path | None,
    Option("--prompts", metavar="FILE", help="Prompts, one a line (the built-in list)."),
]
Json = Annotated[
    bool, Option("--json", help="Print one JSON object instead of text.", rich_help_panel=OUTPUT)
]
Prompts = Annotated[
    Path | None,
    Option(
        "--prompts",
        metavar="FILE",
        rich_help_panel=CALIBRATION,
        help="Calibration prompts, one a line (the built-in list).",
    ),
]

# --- what is quantized and trained ----------------------------------------------------------------

Scheme = Annotated[
    str | None,
    _choice(
        "--scheme", QUANTIZATION,
        f"Bits of weights and inputs: {', '.join(SCHEMES)}; 'static' stores the ranges of inputs, "
        "one a step.", SCHEMES, "S",
    ),
]  # fmt: skip
TextEncoder = Annotated[
    str | None,
    _choice(
        "--text-encoder", QUANTIZATION,
        "Quantize the weights of the text encoders too, to w8 or w4; alone without --scheme.",
        ("w8", "w4"), "W",
    ),
]  # fmt: skip
Method = Annotated[
    str | None,
    _choice(
        "--method", QUANTIZATION,
        "How text encoders are rounded, by an algorithm's name: rtn, awq, clip, omniquant, gptq "
        "(gptq), or several that follow each other, such as awq+clip.",
        ("rtn", "awq", "clip", "omniquant", "gptq"), "M",
    ),
]  # fmt: skip
Temporal = Annotated[
    str,
    _choice(
        "--temporal", QUANTIZATION,
        "Modules that depend on the timestep alone: none, tiar, table, int8, select or auto.",
        ("none", "tiar", "table", "int8", "select", "auto"), "T",
    ),
]  # fmt: skip
TableBudget = Annotated[
    float | None,
    Option(
        "--table-budget", metavar="B", parser=real(0, math.inf, True),
        rich_help_panel=QUANTIZATION,
        help="With --temporal select: their bytes, as a share of tables in fp16 (0.5).",
    ),
]  # fmt: skip
Rounding = Annotated[
    str | None,
    _choice(
        "--rounding", QUANTIZATION,
        "How weights below 8 bits are rounded: nearest, clip, omniquant, gptq, adaround or "
        "several, such as clip+gptq (gptq; with the preset thorough: adaround).",
        ("nearest", "clip", "omniquant", "gptq", "adaround"), "R",
    ),
]  # fmt: skip
Preset = Annotated[
    str,
    _choice(
        "--preset", CALIBRATION, "Calibration effort: quick, standard or thorough.",
        ("quick", "standard", "thorough"), "P",
    ),
]  # fmt: skip
Compact = Annotated[
    bool,
    Option(
        "--compact", rich_help_panel=OUTPUT,
        help="Write a smaller file, which only works with the model at hand.",
    ),
]  # fmt: skip
NewArtifact = Annotated[
    Path, Option("--out", metavar="FILE", help="The artifact to write.", rich_help_panel=OUTPUT)
]
Base = Annotated[
    Path | None,
    Option("--artifact", metavar="FILE", help="The artifact to train for and to extend."),
]

# --- sampling -------------------------------------------------------------------------------------

Steps = Annotated[
    int | None,
    Option(
        "--steps", metavar="N", parser=whole(1), rich_help_panel=SAMPLING,
        help="Sampling steps (the artifact's or the model's, else 20).",
    ),
]  # fmt: skip
Guidance = Annotated[
    float | None,
    Option(
        "--guidance", metavar="G", parser=real(0, math.inf), rich_help_panel=SAMPLING,
        help="Guidance scale (the artifact's or the model's).",
    ),
]  # fmt: skip
Seed = Annotated[
    int,
    Option(
        "--seed", metavar="S", parser=whole(0), rich_help_panel=SAMPLING,
        help="Seed of the first image; the next ones have the numbers after it.",
    ),
]  # fmt: skip
CalibrationSeed = Annotated[
    int,
    Option(
        "--seed", metavar="S", parser=whole(0), rich_help_panel=CALIBRATION,
        help="Seed of calibration: of the first image that it generates, and of what it picks "
        "at random.",
    ),
]  # fmt: skip
Device = Annotated[
    str | None,
    Option(
        "--device", metavar="D", rich_help_panel=SAMPLING,
        help="cpu, cuda, cuda:1, ... (a GPU where there is one).",
    ),
]  # fmt: skip
Execution = Annotated[
    Literal["auto", "int8", "float"],
    Option(
        "--execution", metavar="E", rich_help_panel=SAMPLING,
        help="int8: the artifact's own arithmetic; float: its weights with float inputs; auto: "
        "the faster one, layer by layer, on this machine.",
    ),
]  # fmt: skip

Run = Annotated[
    bool,
    Option(
        "--run", rich_help_panel=SAMPLING,
        help="Load the model and time its first call of the denoiser.",
    ),
]  # fmt: skip

# --- generate, compare, inspect and demo ----------------------------------------------------------

Prompt = Annotated[
    str, Option("--prompt", metavar="TEXT", parser=text, help="What the image shows.")
]
Negative = Annotated[
    str | None, Option("--negative", metavar="TEXT", help="What it should not show.")
]
Artifact = Annotated[
    Path | None,
    Option(
        "--artifact", metavar="FILE",
        help="The artifact to compare with the model; without one, --speedup alone is compared.",
    ),
]  # fmt: skip
WithArtifact = Annotated[
    Path | None, Option("--artifact", metavar="FILE", help="Use this artifact.")
]
Batch = Annotated[
    int,
    Option("--batch", metavar="N", parser=whole(1), help="Number of images, side by side."),
]
Image = Annotated[
    Path | None,
    Option(
        "--out", metavar="FILE", rich_help_panel=OUTPUT,
        help="The image, a PNG (named after the prompt).",
    ),
]  # fmt: skip
Count = Annotated[
    int, Option("--count", metavar="N", parser=whole(1), help="Number of images to compare.")
]
SideBySide = Annotated[
    Path | None,
    Option(
        "--sheet", metavar="FILE", rich_help_panel=OUTPUT,
        help="A PNG with the first eight images with and without, and their difference.",
    ),
]  # fmt: skip
File = Annotated[Path, Argument(metavar="FILE", help="An artifact.")]
Plot = Annotated[
    str | None,
    Option(
        "--plot", metavar="[PNG]", rich_help_panel=OUTPUT,
        help="Plot what it says step by step (into FILE with the ending .png).",
    ),
]  # fmt: skip
Layer = Annotated[
    str | None,
    Option(
        "--layer", metavar="NAME", rich_help_panel=OUTPUT,
        help="The layer whose ranges are plotted (those that change most).",
    ),
]  # fmt: skip
Demo = Annotated[
    str,
    Option(
        "--model", metavar="NAME", help="transformer or unet.",
        autocompletion=lambda: ["transformer", "unet"],
    ),
]  # fmt: skip
Sheet = Annotated[
    Path,
    Option(
        "--out", metavar="DIR", help="Folder for demo.png and demo.json.", rich_help_panel=OUTPUT
    ),
]

# --- app ------------------------------------------------------------------------------------------

ACCESS = "Access"
Port = Annotated[
    int | None,
    Option(
        "--port", metavar="N", parser=whole(1), rich_help_panel=ACCESS,
        help="Port (the first free one from 7860 on).",
    ),
]  # fmt: skip
NoBrowser = Annotated[bool, Option("--no-browser", help="Open no browser, only print the address.")]
Desktop = Annotated[
    bool, Option("--desktop", help="Open a window of its own instead of the browser.")
]
Roots = Annotated[
    list[Path],
    Option(
        "--roots", metavar="DIR...",
        help="Folders with models in diffusers format; no model outside them is opened.",
        show_default=False,
    ),
]  # fmt: skip
AppFolder = Annotated[
    Path,
    Option("--out", metavar="DIR", help="Folder for everything that the app writes."),
]
Listen = Annotated[
    bool,
    Option("--listen", help="Let other machines connect; needs --auth.", rich_help_panel=ACCESS),
]
Auth = Annotated[
    str | None,
    Option(
        "--auth", metavar="USER:PASSWORD", rich_help_panel=ACCESS,
        help="Ask for this name and password.",
    ),
]  # fmt: skip
