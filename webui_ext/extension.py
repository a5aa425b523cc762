"""What is registered with the host each time that it loads its scripts."""

from __future__ import annotations

from typing import Any

from . import api, options, xyz
from .script import TenutoScript, soft
from .session import session


def register() -> type[TenutoScript]:
    """Registers the callbacks; the host forgets them at a reload of the page, and asks again."""
    from modules import script_callbacks as host

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
