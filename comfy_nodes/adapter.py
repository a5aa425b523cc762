"""ComfyUI as a host: the `Host` protocol on a MODEL (a ModelPatcher)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy.patcher_extension import CallbacksMP
from torch import nn

from tenuto.artifact import Artifact
from tenuto.model import Attached
from tenuto.runtime import Host, Patches, as_chosen, host_kernel, replacements_for, with_kernel

from .cache import Cache
from .coded_weights import coded
from .own_formats import check_plain
from .weights import Weights, unpatched
from .wrapping import WRAPPED, Wrapped

CODES = ("weights", "ranges", "temporal")  # sections of an artifact
OF_WEIGHTS = (  # of its header
    "layers", "schemes", "compact", "temporal", "check", "left_in_float", "kept_in_float",
)  # fmt: skip


class ComfyUI(Host):
    """A MODEL is cloned, and the clone carries the patches; the one that was given stays."""

    def denoiser(self, handle: Any) -> nn.Module:
        """`diffusion_model`."""
        return handle.model.diffusion_model

    def install(self, handle: Any, patches: Patches) -> Installed:
        """A clone with the patches in it. `detach` takes them out of shared modules."""
        sampling, artifact = handle.get_model_object("model_sampling"), patches.artifact
        codes = artifact is not None and bool(artifact.header.get("layers"))
        if patches.weights and (patches.scheme is not None or codes):
            check_plain(self.denoiser(handle))
        elif artifact is not None and next(coded(self.denoiser(handle)), None) is not None:
            patches = replace(patches, artifact=without_codes(artifact))  # they are in it already
        patches = with_kernel(as_chosen(patches), lambda: host_kernel(sampling))
        plan = replacements_for(self.denoiser(handle), patches, tensor=unpatched(handle))
        parts: list[Wrapped] = [Weights(plan)] if plan else []
        if plan.forecast is not None:
            parts.append(Cache(handle, plan.forecast))
        elif plan.policy is not None:
            parts.append(Cache(handle, plan.policy))
        return Installed(handle, parts)


def without_codes(artifact: Artifact) -> Artifact:
    """What an artifact has besides quantized layers and tables: its schedule, its forecast."""
    header = {key: value for key, value in artifact.header.items() if key not in OF_WEIGHTS}
    tensors = {
        key: value for key, value in artifact.tensors.items() if key.split("/", 1)[0] not in CODES
    }
    parts = {name: without_codes(part) for name, part in artifact.parts.items()}
    return Artifact(header, tensors, parts)


class Installed(Attached):
    """A patched clone. Without its clone nothing acts; `detach` clears the modules at once."""

    def __init__(self, handle: Any, parts: list[Wrapped]) -> None:
        for part in parts:
            handle = part.apply(handle)
        super().__init__(handle, ())
        self.parts = parts

    def detach(self) -> None:
        """Take the patches out of the modules and off the clone; twice does no harm."""
        for part in self.parts:
            part.eject(self.handle)
            self.handle.remove_injections(part.key)
            for kind in WRAPPED:
                self.handle.remove_wrappers_with_key(kind, part.key)
            self.handle.remove_callbacks_with_key(CallbacksMP.ON_DETACH, part.key)
            self.handle.remove_attachments(part.key)
