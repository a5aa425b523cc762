"""Patches inside a denoiser that keep something of a call: what a skipped call would not do."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OURS = ("diffusers.models.", "diffusers.hooks.", "tenuto.")  # what is there keeps nothing of a call


def inner_patch(denoiser: nn.Module) -> str:
    """The name of a module inside `denoiser` that reads along, "" if there is none.

    A hook, as of self-attention guidance, or an attention processor of another library's or of a
    pipeline's own: both may keep what they see for the rest of the step.
    """
    for name, module in denoiser.named_modules():
        if name and any(_foreign(vars(module).get(hooks)) for hooks in HOOKS):
            return name
        processor = vars(module).get("processor")
        if processor is not None and not type(processor).__module__.startswith(OURS):
            return name
    return ""


def _foreign(hooks: Any) -> bool:
    """Whether one of a module's hooks is not of this library or of torch itself."""
    return any(
        not str(getattr(hook, "__module__", type(hook).__module__)).startswith(("torch.", *OURS))
        for hook in (hooks or {}).values()
    )
