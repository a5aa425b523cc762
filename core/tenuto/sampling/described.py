"""A pipeline's keywords as an artifact's header has them, and such a header as keywords again.

What is plain data can be repeated. Of images and tensors a header has a mark: what they were,
by their bits, so that the same can be given again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from torch import Tensor

from ..errors import ArtifactError, TenutoError
from ..files import bits_of
from ..text import printable

MARK = "sha256"  # the key that tells a mark from plain data
SCALARS = (str, int, float, bool, type(None))


def described(call: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keywords of a call as plain data."""
    return {name: _described(value) for name, value in (call or {}).items()}


def _described(value: Any) -> Any:
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if hasattr(value, "getbands"):  # PIL
        return _mark(value.tobytes(), image=list(value.size)) | _name_of(value)
    if isinstance(value, Tensor):
        return _mark(bits_of(value).numpy().tobytes(), tensor=list(value.shape))
    if hasattr(value, "tobytes") and hasattr(value, "shape"):  # numpy
        return _mark(value.tobytes(), array=list(value.shape))
    return {MARK: None, "type": type(value).__name__}


def _mark(content: bytes, **what: Any) -> dict[str, Any]:
    return {MARK: hashlib.sha256(content).hexdigest()[:16]} | what


def _name_of(image: Any) -> dict[str, str]:
    """The name of the file that an image comes from; where that lies is nobody's business."""
    path = getattr(image, "filename", None)
    return {"file": PurePath(str(path)).name} if path else {}


def is_plain(value: Any) -> bool:
    """Whether a described value can be passed on: there is no mark in it."""
    if isinstance(value, Mapping):
        return MARK not in value and all(map(is_plain, value.values()))
    return all(map(is_plain, value)) if isinstance(value, list) else True


def repeated(schedule: Mapping[str, Any], call: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keywords that an artifact with this schedule was calibrated with, changed by `call`.

    TenutoError names the images and tensors among them that `call` does not give.
    """
    known = schedule.get("call", {})
    if not isinstance(known, dict) or not all(isinstance(name, str) for name in known):
        raise ArtifactError("The artifact is damaged: its schedule has no such call.")
    given = dict(call or {})
    lost = [name for name, value in known.items() if name not in given and not is_plain(value)]
    if lost:
        files = [known[name].get("file") for name in lost if isinstance(known[name], dict)]
        names = [str(file) for file in files if file]
        said = printable(f" ({', '.join(names)})" if names else "", 200)
        raise TenutoError(
            f"The artifact was calibrated with {printable(', '.join(lost), 200)}{said}: give the "
            "same in the call (call=, or --image, --mask, --set NAME=@FILE)."
        )
    return {name: value for name, value in known.items() if name not in given} | given
