"""The only place that imports ComfyUI's V3 API: what is called "latest" may move."""

from dataclasses import fields
from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

ArtifactType = io.Custom("TENUTO_ARTIFACT")


def found_by(*words: str) -> dict[str, Any]:
    """What else finds a node in the search of a host that knows of it; a schema takes it whole."""
    known = {field.name for field in fields(io.Schema)}
    return {"search_aliases": list(words)} if "search_aliases" in known else {}


def folded(field: Any) -> Any:
    """An input that a page which can folds away until somebody wants it."""
    if hasattr(field, "advanced"):
        field.advanced = True
    else:
        field.extra_dict = field.extra_dict | {"advanced": True}
    return field


__all__ = ["ArtifactType", "ComfyExtension", "folded", "found_by", "io", "ui"]
