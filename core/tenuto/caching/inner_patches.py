"""Patches inside a denoiser that keep something of a call: what a skipped call would not do."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What is there keeps nothing of a call; A1111's lowvram moves weights. ComfyUI's models have
# processors of their own, as HiDream.
OURS = ("diffusers.models.", "diffusers.hooks.", "tenuto.", "modules.lowvram", "comfy.ldm.")


def inner_patch(denoiser: nn.Module) -> str:
    """The name of a module inside `denoiser` that reads along, "" if there is none.

    A hook, as of self-attention guidance, or an attention processor of another library's or of a
    pipeline's own: both may keep what they see for the rest of the step.
    """
    if not _quickly(denoiser):
        return ""
    return next((name for name, m in denoiser.named_modules() if _reads(m, bool(name))), "")


def _quickly(denoiser: nn.Module) -> bool:
    """Whether any module may read along; asked once a run, which a GPU may wait for."""
    waiting: list[Any] = [denoiser]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        waiting.extend(own["_modules"].values())
        odd = own["_forward_hooks"] or own["_forward_pre_hooks"] or "processor" in own
        if odd and _reads(module, module is not denoiser):
            return True
    return False


def _reads(module: nn.Module, hooked: bool) -> bool:
    """Whether a module's processor, or one of its hooks if those count, may read along."""
    own = vars(module)
    if hooked and any(map(_foreign, filter(None, map(own.get, HOOKS)))):
        return True
    processor = own.get("processor")
    return processor is not None and not type(processor).__module__.startswith(OURS)


def _foreign(hooks: Any) -> bool:
    """Whether one of a module's hooks is not of this library or of torch itself."""
    return any(
        not str(getattr(hook, "__module__", type(hook).__module__)).startswith(("torch.", *OURS))
        for hook in hooks.values()
    )
