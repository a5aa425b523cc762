"""Measured numbers as rows for people: from `Comparison.to_json`, nothing is computed anew."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from tenuto.artifact.summary import mib
from tenuto.caching import predicted

from .view import lasting, table

Numbers = Mapping[str, Any]
ABSENT = "–"


def compared(found: Mapping[str, Numbers]) -> str:
    """One column an artifact, full precision first, and on what it was measured below."""
    first = next(iter(found.values()))
    full = [
        _seconds(first, "float"), ABSENT, ABSENT, ABSENT, ABSENT, ABSENT, ABSENT,
        mib(first["resident_weight_bytes"]["float"]), "float",
    ]  # fmt: skip
    names = [
        "seconds an image", f"times as fast as {first['dtype']}", "PSNR, dB", "SSIM", "LPIPS",
        _left_out(first), "weights in 8 bits", "denoiser weights", "executed",
    ]  # fmt: skip
    columns = [full, *(_column(numbers) for numbers in found.values())]
    rows = [(name, *values) for name, *values in zip(names, *columns, strict=True)]
    notes = [html.escape(_floor(first)), *(_note(name, n) for name, n in found.items())]
    said = "".join(f"<p>{line}</p>" for line in notes if line)
    return f"{table(rows, ['', 'full precision', *found])}{said}{_place(first)}"


def generated(numbers: Numbers, seconds: float, steps: int, device: str) -> str:
    """One image that was generated alone: there is nothing to compare it with."""
    rows = [("this image", f"{lasting(seconds)}, {steps} steps, {device}")]
    if numbers["execution"]["layers"]:
        rows.append(("layers", _layers(numbers)))
        rows.append((_left_out(numbers), _share(numbers["reuse_ratio"])))
    if numbers.get("prompt_reused"):
        rows.append(("prompt", "encoded before: the text encoder did not run"))
    forecast = numbers.get("forecast")
    if forecast and forecast["skipped"]:
        said = predicted(forecast["predicted_db"], bool(forecast["kernel"]))
        rows.append(("forecast", said.removesuffix(".")))
    return table(rows) + (
        "<p>Turn on “beside full precision” to measure what the artifact changes.</p>"
        if numbers["execution"]["layers"]
        else ""
    )


def _column(numbers: Numbers) -> list[str]:
    return [
        _seconds(numbers, "artifact"), _times(numbers), _psnr(numbers["psnr_db"]),
        _shown(numbers["ssim"], 4), _shown(numbers["lpips"], 4), _share(numbers["reuse_ratio"]),
        _share(numbers["int8_weight_share"]),
        mib(numbers["resident_weight_bytes"]["artifact"]), _layers(numbers),
    ]  # fmt: skip


def _left_out(numbers: Numbers) -> str:
    """What the share is of that was not computed: whole calls, or branches."""
    skipped = numbers.get("asked_speedup") not in (None, 1)
    return "denoiser calls skipped" if skipped else "branch calls reused"


def _times(numbers: Numbers) -> str:
    gain = numbers["speedup"]
    return "simulated, no gain" if gain is None else f"{gain:.2f}"


def _seconds(numbers: Numbers, which: str) -> str:
    return _shown(numbers["seconds_per_picture"][which], 2)


def _psnr(value: Mapping[str, float | None] | None) -> str:
    if value is None:
        return ABSENT
    return "equal images" if value["median"] is None else f"{value['median']:.1f}"


def _shown(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"


def _layers(numbers: Numbers) -> str:
    layers = numbers["execution"]["layers"]
    return ", ".join(f"{how} ({n})" for how, n in layers.items() if n) or "float"


def _floor(numbers: Numbers) -> str:
    floor, own = numbers["bf16_floor_psnr_db"], numbers["seconds_per_picture"]["bf16"]
    time = "" if own is None else f", {_shown(own, 2)} s an image"
    return "" if floor is None else f"Plain bf16, the noise floor: PSNR {_psnr(floor)} dB{time}."


def _note(name: str, numbers: Numbers) -> str:
    said = " ".join(filter(None, [numbers.get("said"), numbers.get("note")]))
    return f"{html.escape(name)}: {html.escape(said)}" if said else ""


def _place(numbers: Numbers) -> str:
    count, threads = numbers["count"], numbers["threads"]
    guidance = numbers["guidance"]
    said = (
        f"Measured on {count} image{'s' * (count > 1)}, {numbers['steps']} steps"
        + ("" if guidance is None else f", guidance {guidance:g}")
        + f", {numbers['device']}, {threads} thread{'s' * (threads > 1)}, "
        + f"torch {numbers['versions']['torch']}."
    )
    return f'<p class="tenuto-small">{html.escape(said)}</p>'
