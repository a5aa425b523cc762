"""The settings page "Tenuto". What changes images is written into their infotext by the host."""

from __future__ import annotations

import logging
from typing import Any

from .weights import AGAIN, SIDE, WHOLE

SECTION = ("tenuto", "Tenuto")
COMPUTED, HALF = "as computed", "fp16"
LEVELS = ("ERROR", "WARNING", "INFO", "DEBUG")
EXECUTIONS = ("auto", "int8", "float")
DEFAULTS: dict[str, Any] = {
    "folder": "", "cache_dtype": COMPUTED, "lora": SIDE, "execution": "auto", "img2img": True,
    "infotext": True, "log_level": "WARNING",
}  # fmt: skip


def option(name: str) -> Any:
    """The value of a setting, its default where the host has none."""
    from modules import shared

    return getattr(shared.opts, f"tenuto_{name}", DEFAULTS[name])


def on_ui_settings() -> None:
    """Adds the page."""
    import gradio as gr
    from modules import shared
    from modules.options import OptionInfo

    def add(name: str, label: str, info: str, kind: Any = None, **more: Any) -> None:
        choices = {"choices": more.pop("choices")} if "choices" in more else {}
        made = OptionInfo(
            DEFAULTS[name], label, kind or gr.Radio, choices, section=SECTION, **more
        )  # fmt: skip
        shared.opts.add_option(f"tenuto_{name}", made.info(info))

    add("folder", "Folder of artifacts", "empty: models/tenuto", gr.Textbox)
    add(
        "cache_dtype", "Stored features are kept", "fp16 halves their memory at fp32",
        choices=[COMPUTED, HALF], infotext="Tenuto cache dtype",
    )  # fmt: skip
    add(
        "lora", "LoRA on quantized layers",
        "side branch: exact; requantise: into the codes; off: such layers stay in full precision",
        choices=[SIDE, AGAIN, WHOLE], infotext="Tenuto LoRA",
    )  # fmt: skip
    add(
        "execution", "Quantized layers compute in",
        "auto: int8 or float, whichever was faster when timed; int8: the same in every process",
        choices=list(EXECUTIONS), infotext="Tenuto arithmetic",
    )  # fmt: skip
    add("img2img", "Also for img2img", "off: Tenuto acts in txt2img alone", gr.Checkbox)
    add("infotext", "Write settings into the infotext", "of every image", gr.Checkbox)
    add(
        "log_level", "Log level", "of the logger tenuto", choices=list(LEVELS),
        onchange=apply_log_level,
    )  # fmt: skip


def apply_log_level() -> None:
    """The logger says as much as the settings want."""
    logging.getLogger("tenuto").setLevel(str(option("log_level")))
