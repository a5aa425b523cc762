"""LoRAs in Generate and Compare: a list of names with weights, checked, kept and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenuto.errors import TenutoError
from tenuto.sampling.loading import class_of
from tenuto.sampling.loras import Lora, check_takes_loras
from tenuto.text import prompts_of

from .given import real, words
from .places import Places

MOST = 20  # of one image
LONGEST = 10_000  # characters of the list
STRONGEST = 100


def chosen(places: Places, model: str, text: Any) -> dict[str, Lora]:
    """The LoRAs that a list names, each by its line: NAME or NAME:WEIGHT; TenutoError, a sentence.

    model: what `load` takes; its pipeline must take LoRAs if any is named.
    """
    lines = prompts_of(words(text, "The list of LoRAs", LONGEST))
    if len(lines) > MOST:
        raise TenutoError(f"There are {len(lines)} LoRAs: at most {MOST} are taken.")
    kind = class_of(model) if lines else None
    if kind is not None:
        check_takes_loras(kind)
    found = dict[str, Lora]()
    for line in lines:
        name, lora = _read(places, line)
        if any(lora.file == other.file for other in found.values()):
            raise TenutoError(f"The LoRA {name.partition(':')[0]} is in the list twice.")
        found[name] = lora
    return found


def _read(places: Places, line: str) -> tuple[str, Lora]:
    """A line as the app writes it, and the LoRA."""
    name, sign, end = line.rpartition(":")
    shown, file = places.lora(name.strip() if sign else line)
    weight = real(end, "The weight of a LoRA", -STRONGEST, STRONGEST) if sign else 1.0
    plain = weight == 1 and ":" not in shown
    return shown if plain else f"{shown}:{weight:.10g}", Lora(file, weight)


def kept(loras: Mapping[str, Lora]) -> dict[str, list[Any]]:
    """LoRAs as plain data, for the request of a job."""
    return {line: [str(lora.file), lora.weight] for line, lora in loras.items()}


def described(loras: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of an image say of them: nothing where there are none."""
    return {"loras": [*loras]} if loras else {}


def as_text(loras: Sequence[str] | Mapping[str, Any]) -> str:
    """Their lines, as the field has them."""
    return "\n".join(loras)


def there(places: Places, text: str) -> tuple[str, list[str]]:
    """The lines of a list whose LoRAs are there, and the others."""
    found, lost = dict[str, Lora](), list[str]()
    for line in prompts_of(text[:LONGEST])[:MOST]:
        try:
            found.update([_read(places, line)])
        except TenutoError:
            lost.append(line)
    return as_text(found), lost
