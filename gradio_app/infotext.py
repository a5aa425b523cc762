"""Settings as A1111 writes them under an image, and read back: parsed, never evaluated.

    a goldfish
    Steps: 20, Sampler: DDIM, CFG scale: 2, Seed: 7, Size: 64x64, Model: demo:transformer

The prompt's lines come first, then perhaps "Negative prompt:", then one line of "Name: value"; a
value that holds a comma, a colon or a line break is a JSON string. Lines end with "\\n" and with
nothing else. A prompt that these rules would not give back, as it has a line "Negative prompt:",
is written once more, as the value "Tenuto prompt".
"""

from __future__ import annotations

import json
import math
from typing import Any

LONGEST = 50_000  # characters of a prompt
ALL = 8 * LONGEST  # of an infotext, which may have the prompt twice, once escaped
PAIRS = 100  # values that are looked at
NEGATIVE = "Negative prompt:"
NUMBERS = {"steps": (1, 1000), "guidance": (0, 1000), "seed": (0, 2**53)}  # least, most
WHOLE = "Tenuto prompt"
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
        ("CFG scale", None if settings["guidance"] is None else f"{settings['guidance']:.10g}"),
        ("Seed", settings["seed"]),
        ("Size", settings.get("size")),
        ("Model", settings["model"]),
        ("Tenuto artifact", settings.get("artifact")),
        ("Version", settings.get("version")),
    ]
    prompt = settings["prompt"].strip()
    text = f"{prompt}\n{_line(values)}"
    if parsed(text).get("prompt", "") == prompt:
        return text
    return f"{prompt}\n{_line([*values, (WHOLE, prompt)])}"


def _line(values: list[tuple[str, Any]]) -> str:
    return ", ".join(f"{name}: {_quoted(value)}" for name, value in values if value is not None)


def _quoted(value: Any) -> str:
    text = str(value)
    plain = text == text.strip() and not set(text) & set(',:"\n')
    return text if plain else json.dumps(text, ensure_ascii=False)


def parsed(text: str) -> dict[str, Any]:
    """The settings in an infotext, as far as the app has them; the rest is left out."""
    lines = text[:ALL].strip().split("\n")  # other separators of lines may be in a prompt
    pairs = dict(_pairs(lines[-1]))
    body = lines[:-1] if "Steps" in pairs else lines
    end = next((i for i, line in enumerate(body) if line.startswith(NEGATIVE)), len(body))
    prompt = "\n".join(body[:end]).strip()
    if "Steps" in pairs:
        prompt = pairs.get(WHOLE, prompt).strip()
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
    while rest and len(found) < PAIRS:
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
