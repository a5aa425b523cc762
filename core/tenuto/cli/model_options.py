"""MODEL of every command, and the options that say how to read it."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

MODEL = "The model"

Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A .safetensors checkpoint as ComfyUI and Forge have them, a folder in diffusers "
        "format, a hub id, demo:transformer or demo:unet.",
        autocompletion=lambda: ["demo:transformer", "demo:unet"],
    ),
]
Config = Annotated[
    str | None,
    Option(
        "--config", metavar="FOLDER", rich_help_panel=MODEL,
        help="Of a checkpoint in a single file: a model of the same kind (a folder, or a hub id, "
        "of which a few MB are downloaded) for configurations and tokenizers (one that is on this "
        "machine).",
    ),
]  # fmt: skip
Lora = Annotated[
    list[str],
    Option(
        "--lora", metavar="FILE[:WEIGHT]", rich_help_panel=MODEL, show_default=False,
        help="A LoRA of the model, a .safetensors file, and how strong it is (1). May be given "
        "several times.",
    ),
]  # fmt: skip
