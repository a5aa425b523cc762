"""Settings as A1111 writes them under an image, and read back: parsed, never evaluated.

    a goldfish
    Steps: 20, Sampler: DDIM, CFG scale: 2, Seed: 7, Size: 64x64, Model: demo:transformer

The prompt's lines come first, then perhaps "Negative prompt:", then one line of "Name: value"; a
value that holds a comma, a colon or a line break is a JSON string. Lines end as `lines_of` says. A
prompt that these rules would not give back, as it has a line "Negative prompt:", is written once
more, as the value "Tenuto prompt". What else the pipeline was called with is JSON, as the value
"Tenuto call".
"""

from __future__ import annotations

import json
import math
from typing import Any

from tenuto.text import lines_of

LONGEST = 50_000  # characters of a prompt
LONGEST_CALL = 10_000  # of the pipeline's own settings, as JSON
ALL = 8 * (LONGEST + LONGEST_CALL)  # of an infotext, which may have both twice, once escaped
PAIRS = 100  # values that are looked at
NEGATIVE = "Negative prompt:"
NUMBERS = {
    "steps": (1, 1000), "guidance": (0, 1000), "seed": (0, 2**53), "speedup": (1, 200),
}  # fmt: skip
FRACTIONS = ("guidance", "speedup")  # of them; the others are whole
WHOLE, CALL, NEGATIVE_OF = "Tenuto prompt", "Tenuto call", "negative_prompt"
FIELDS = {
    "Steps": "steps",
    "CFG scale": "guidance",
    "Seed": "seed",
    "Model": "model",
    "Tenuto artifact": "artifact",
    "Tenuto speedup": "speedup",
    "Tenuto LoRAs": "loras",
}


def written(settings: dict[str, Any]) -> str:
    """The infotext of an image.

    settings: prompt, steps, guidance, seed and model; perhaps artifact, speedup, loras (a line
    each), sampler, size, call.
    """
    call = settings.get("call") or {}
    values = [
        ("Steps", settings["steps"]),
        ("Sampler", settings.get("sampler")),
        ("CFG scale", _shown(settings["guidance"])),
        ("Seed", settings["seed"]),
        ("Size", settings.get("size")),
        ("Model", settings["model"]),
        ("Tenuto artifact", settings.get("artifact")),
        ("Tenuto speedup", _shown(settings.get("speedup"))),
        ("Tenuto LoRAs", "\n".join(settings.get("loras", ())) or None),
        (CALL, json.dumps(call, ensure_ascii=False) if call else None),
        ("Version", settings.get("version")),
    ]
    prompt, negative = settings["prompt"].strip(), call.get(NEGATIVE_OF)
    above = f"{prompt}\n" if prompt else ""
    if isinstance(negative, str) and negative.strip():
        above += f"{NEGATIVE} {negative.strip()}\n"  # as other programs look for it
    text = f"{above}{_line(values)}"
    if parsed(text).get("prompt", "") == prompt:
        return text
    return f"{above}{_line([*values, (WHOLE, prompt)])}"


def as_number(speedup: float | str | None, skipped: float | None) -> float | None:
    """A speedup as it is written beside an image: "auto" as the one that skips as many calls.

    skipped: the share of the run's calls that were skipped, None where none were.
    """
    if isinstance(speedup, str):
        return math.floor(1e4 / (1 - (skipped or 0.0))) / 1e4  # never a call less
    return speedup


def _shown(value: float | None) -> str | None:
    return None if value is None else f"{value:.10g}"


def _line(values: list[tuple[str, Any]]) -> str:
    return ", ".join(f"{name}: {_quoted(value)}" for name, value in values if value is not None)


def _quoted(value: Any) -> str:
    text = str(value)
    plain = text == text.strip() and not set(text) & set(',:"\r\n')
    return text if plain else json.dumps(text, ensure_ascii=False)


def parsed(text: str) -> dict[str, Any]:
    """The settings in an infotext, as far as the app has them; the rest is left out."""
    lines = lines_of(text[:ALL].strip()) or [""]
    pairs = dict(_pairs(lines[-1]))
    body = lines[:-1] if "Steps" in pairs else lines
    end = next((i for i, line in enumerate(body) if line.startswith(NEGATIVE)), len(body))
    prompt = "".join(body[:end]).strip()
    negative = "".join(body[end:]).strip().removeprefix(NEGATIVE).strip()
    if "Steps" in pairs:
        prompt = pairs.get(WHOLE, prompt).strip()
    found: dict[str, Any] = {"prompt": prompt} if prompt else {}
    for name, field in FIELDS.items():
        value = pairs.get(name) if "Steps" in pairs else None
        if value is not None and field in NUMBERS:
            value = _number(value, *NUMBERS[field], whole=field not in FRACTIONS)
        if value is not None:
            found[field] = value
    other = {} if WHOLE in pairs or not negative else {NEGATIVE_OF: negative}
    call = _object(pairs[CALL]) if CALL in pairs else other
    return found | {"call": call} if call and "Steps" in pairs else found


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
