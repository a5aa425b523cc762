"""What is registered with the host each time that it loads its scripts."""

from __future__ import annotations

import logging
from typing import Any

from modules import scripts

from . import api, hosts, options, xyz
from .script import TenutoScript, soft
from .session import session

log = logging.getLogger("tenuto")

UNSUPPORTED = "SD.Next is not supported: it has no callback for an evaluation."


class Unsupported(scripts.Script):
    """Stands in for the script where the host is not supported: one sentence, and no fields."""

    def title(self) -> str:
        """Its name, in the API too."""
        return "Tenuto"

    def show(self, is_img2img: bool) -> Any:
        """In both tabs."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """The sentence in the place of the accordion."""
        import gradio as gr

        gr.HTML(f"<p>Tenuto: {UNSUPPORTED}</p>")
        return []


def register() -> type[scripts.Script]:
    """Registers the callbacks; the host forgets them at a reload of the page, and asks again.

    SD.Next, whose callbacks take no name, gets none of them: its log says so once, and the
    script that is returned says it on the page.
    """
    from modules import script_callbacks as host

    if hosts.detect() == "sdnext":
        log.warning("Tenuto: %s", UNSUPPORTED)
        return Unsupported
    name = "tenuto"
    host.on_ui_settings(options.on_ui_settings, name=name)
    host.on_before_ui(before_ui, name=name)
    host.on_app_started(api.on_app_started, name=name)
    host.on_cfg_denoiser(evaluates, name=name)
    host.on_model_loaded(model_loaded, name=name)
    host.on_script_unloaded(unloaded, name=name)
    return TenutoScript


def before_ui() -> None:
    """Settings are there, the page is not yet."""
    soft(xyz.register)
    soft(options.apply_log_level)


def evaluates(params: Any) -> None:
    """A step's evaluation begins."""
    soft(session.evaluates, params)


def model_loaded(sd_model: Any) -> None:
    """Another checkpoint."""
    soft(session.forget)


def unloaded() -> None:
    """The page is reloaded, or the host ends."""
    soft(session.forget)
