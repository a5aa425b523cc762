"""The options of `tenuto text-encoder`, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..sampling.consumers import CONSUMERS
from .arguments import size, whole
from .options import CALIBRATION, OUTPUT, QUANTIZATION, _choice

SCHEMES = ("w4a8", "w4a16", "w8a8", "fp8", "nvfp4")
METHODS = ("rtn", "awq", "gptq", "awq+gptq")

Encoder = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A folder of transformers, a pipeline's folder (its text encoder), or one of "
        "ComfyUI's single files in 16 bits.",
    ),
]
For = Annotated[
    str,
    _choice(
        "--for", QUANTIZATION,
        f"Which denoiser is to read it: {', '.join(CONSUMERS)}. Its template, padding and hidden "
        "states count.", tuple(CONSUMERS), "NAME",
    ),
]  # fmt: skip
Scheme = Annotated[
    str,
    _choice(
        "--scheme", QUANTIZATION,
        f"Numbers of the file: {', '.join(SCHEMES)} (w4a8 and w4a16 are the same file).",
        SCHEMES, "S",
    ),
]  # fmt: skip
Method = Annotated[
    str,
    _choice(
        "--method", QUANTIZATION,
        f"How weights are rounded: {', '.join(METHODS)}; awq folds scales into the layers before.",
        METHODS, "M",
    ),
]  # fmt: skip
Embeddings = Annotated[
    str,
    _choice(
        "--embeddings", QUANTIZATION,
        "Of the words: bf16, or int8 with a scale a row, which halves them (a GB of UMT5).",
        ("bf16", "int8"), "E",
    ),
]  # fmt: skip
Config = Annotated[
    Path | None,
    Option(
        "--config", metavar="FOLDER",
        help="Of a single file: the folder with its config.json and tokenizer (its own).",
    ),
]  # fmt: skip
Out = Annotated[
    Path,
    Option("--out", metavar="FILE", rich_help_panel=OUTPUT, help="The .safetensors file to write."),
]
MaxMemory = Annotated[
    int | None,
    Option(
        "--max-memory", metavar="SIZE", parser=size, rich_help_panel=CALIBRATION,
        help="Memory that quantizing may take, such as 10GiB: an encoder that is large for it "
        "stays on disk and is read block by block, which is slower (what is free).",
    ),
]  # fmt: skip
Seed = Annotated[
    int,
    Option(
        "--seed", metavar="S", parser=whole(0), rich_help_panel=CALIBRATION,
        help="Seed of what calibration picks at random.",
    ),
]  # fmt: skip
