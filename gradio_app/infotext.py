"""Settings as A1111 writes them under an image, and read back: parsed, never evaluated.

    a goldfish
    Steps: 20, Sampler: DDIM, CFG scale: 2, Seed: 7, Size: 64x64, Model: demo:transformer

The prompt's lines come first, then perhaps "Negative prompt:", then one line of "Name: value"; a
value that holds a comma, a colon or a line break is a JSON string.
"""

from __future__ import annotations

import json
import math
from typing import Any

LONGEST = 20_000  # characters of an infotext
NEGATIVE = "Negative prompt:"
NUMBERS = {"steps": (1, 1000), "guidance": (0, 1000), "seed": (0, 2**53)}  # least, most
FIELDS = {
    "Steps": "steps",
    "CFG scale": "guidance",
    "Seed": "seed",
    "Model": "model",
    "Tenuto artifact": "artifact",
}


def written(settings: dict[str, Any]) -> str:
    """The infotext of an image. settings: prompt, steps, guidance, seed, model, sampler, size."""
    values = [
        ("Steps", settings["steps"]),
        ("Sampler", settings.get("sampler")),
        ("CFG scale", None if settings["guidance"] is None else f"{settings['guidance']:g}"),
        ("Seed", settings["seed"]),
        ("Size", settings.get("size")),
        ("Model", settings["model"]),
        ("Tenuto artifact", settings.get("artifact")),
        ("Version", settings.get("version")),
    ]
    last = ", ".join(f"{name}: {_quoted(value)}" for name, value in values if value is not None)
    return f"{settings['prompt'].strip()}\n{last}"


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def parsed(text: str) -> dict[str, Any]:
    """The settings in an infotext, as far as the app has them; the rest is left out."""
    lines = text[:LONGEST].strip().splitlines()
    if not lines:
        return {}
    pairs = dict(_pairs(lines[-1]))
    body = lines[:-1] if "Steps" in pairs else lines
    end = next((i for i, line in enumerate(body) if line.startswith(NEGATIVE)), len(body))
    prompt = "\n".join(body[:end]).strip()
    found: dict[str, Any] = {"prompt": prompt} if prompt else {}
    for name, field in FIELDS.items():
        value = pairs.get(name) if "Steps" in pairs else None
        if value is not None and field in NUMBERS:
            value = _number(value, *NUMBERS[field], whole=field != "guidance")
        if value is not None:
            found[field] = value
    return found


def _number(text: str, least: float, most: float, whole: bool) -> float | int | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value) or not least <= value <= most or (whole and value % 1):
        return None
    return int(value) if whole else value


def _pairs(line: str) -> list[tuple[str, str]]:
    """(name, value) along a line; a value in quotes is a JSON string."""
    found, rest = [], line
    while rest:
        name, colon, rest = rest.partition(":")
        if not colon:
            break
        rest = rest.lstrip()
        value, rest = _value(rest)
        found.append((name.strip(), value))
        rest = rest.partition(",")[2].lstrip()
    return found


def _value(rest: str) -> tuple[str, str]:
    """The value at the start of `rest`, and what follows it."""
    if rest.startswith('"'):
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
            return str(value), rest[end:]
        except ValueError:
            pass
    value, comma, after = rest.partition(",")
    return value.strip(), comma + after
