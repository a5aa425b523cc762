"""Whether the tensors of a file hold numbers that can be computed with."""

from __future__ import annotations

from torch import Tensor

from ..errors import ArtifactError
from ..text import printable

LARGEST = 2.0**20  # of any number in a file: features in half precision end before
POSITIVE = (".scale", ".channel", ".step")  # tensors that are divided by
WORDS = 80  # characters of a name in a sentence


def check_values(key: str, found: Tensor, name: str) -> None:
    """Finite numbers that no product of a few makes infinite; of what is divided by, positive."""
    said = None
    if found.is_floating_point() and not bool(found.isfinite().all()):
        said = "not finite"
    elif key.endswith(POSITIVE) and not bool((found > 0).all()):
        said = "not above 0"
    elif found.is_floating_point() and not bool((found.abs() <= LARGEST).all()):
        said = f"beyond {LARGEST:g}"
    if said is not None:
        raise ArtifactError(
            f"{name} is damaged: {printable(key, WORDS)} has values that are {said}."
        )


def check_floats(key: str, found: Tensor, name: str) -> None:
    """The bytes of 8-bit floats: one that is no number is refused, and a step that is below 0."""
    if bool((found & 0x7F == 0x7F).any()):
        raise ArtifactError(f"{name} is damaged: {printable(key, WORDS)} has codes of no number.")
    if key.endswith(".step") and bool((found > 0x7F).any()):
        raise ArtifactError(
            f"{name} is damaged: {printable(key, WORDS)} has values that are not above 0."
        )
