"""An artifact of several denoisers in one file: the further ones are parts under their names.

In the header they are under "parts", and their tensors are called "parts/NAME/section/...". What is
of the main denoiser is where it is in a file of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .curve_tables import in_curves
from .header import JOINED, VERSION

PARTS, FORM = "parts", "format_version"  # a file has one version, at the top
Content = tuple[dict[str, Any], dict[str, Tensor]]  # header and tensors


def joined(
    header: dict[str, Any], tensors: dict[str, Tensor], parts: Mapping[str, Content]
) -> Content:
    """Header and tensors as a file has them; those of an artifact without parts as they are."""
    curves = any(in_curves(own) for own in (tensors, *(some for _, some in parts.values())))
    if curves:
        header = header | {FORM: VERSION}
    if not parts:
        return header, tensors
    kept, found = {}, dict(tensors)
    for name, (own, some) in sorted(parts.items()):
        kept[name] = {key: value for key, value in own.items() if key != FORM}
        found |= {f"{PARTS}/{name}/{key}": value for key, value in some.items()}
    return header | {FORM: VERSION if curves else JOINED, PARTS: kept}, found


def apart(header: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Content, dict[str, Content]]:
    """What `joined` has joined, from a header that was checked."""
    parts: dict[str, Content] = {}
    for name, own in header.get(PARTS, {}).items():
        start = f"{PARTS}/{name}/"
        some = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        parts[name] = {FORM: header[FORM]} | own, some
        tensors = {k: v for k, v in tensors.items() if not k.startswith(start)}
    return ({k: v for k, v in header.items() if k != PARTS}, tensors), parts
