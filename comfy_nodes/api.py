"""The only place that imports ComfyUI's V3 API: what is called "latest" may move."""

from comfy_api.latest import ComfyExtension, io, ui

ArtifactType = io.Custom("TENUTO_ARTIFACT")

__all__ = ["ArtifactType", "ComfyExtension", "io", "ui"]
