"""What is said to a user: the status line, and the line under the image."""

from __future__ import annotations

from html import escape
from typing import Any

from tenuto.caching import FOREIGN, SHORTEST
from tenuto.errors import TenutoError

from . import artifacts, hosts
from .choices import CACHES, FROM_ARTIFACT, OFF, RULES, SHORT, Choices
from .plans import cache_of, share
from .session import Report, session
from .weights import SIDE, WHOLE

FLOAT = {"dequantized", "simulated", "weight-only"}


def under_picture(report: Report) -> str:
    """One line: what was computed, how layers computed, and what was measured."""
    parts = []
    total = report.computed + report.reused
    if total:
        share = report.computed / total
        parts.append(f"{report.computed} of {total} blocks computed ({share:.0%})")
    total = report.calls + report.skipped
    if total:
        share = report.skipped / total
        parts.append(f"{report.skipped} of {total} calls of the model skipped ({share:.0%})")
    parts += report.predicted
    parts += layers(report)
    if report.speedup is not None:
        how = f"{report.speedup:.2f} times as fast as without, measured in this session"
        parts.append(how if report.speedup >= 1 else f"{how}: slower than without")
    parts += report.notes
    if not parts:
        return "Tenuto: nothing was attached."
    return "Tenuto: " + "; ".join(part.rstrip(".") for part in parts)


def layers(report: Report) -> list[str]:
    """ "278 layers W8A8 (int8 200, dequantized 78)", "LoRA: 2 applied as side branch"."""
    if not report.layers:
        return []
    kinds = ", ".join(f"{n} layers {name.upper()}" for name, n in sorted(report.layers.items()))
    how = ", ".join(f"{name} {count}" for name, count in sorted(report.how.items()))
    found = [f"{kinds} ({how})" if how else kinds]
    if report.how and not report.how.keys() - FLOAT:
        found.append("layers compute in float here, which gains no time")
    done, skipped = (report.lora, 0) if report.lora_mode != WHOLE else (0, report.lora)
    if report.lora:
        how = "as side branch" if report.lora_mode == SIDE else report.lora_mode
        found.append(f"LoRA: {done} layers applied {how}, {skipped} left in full precision")
    return found


def forecast(choices: Choices) -> str:
    """What the chosen fields will do, as far as it is known without a model."""
    if not choices.enabled:
        return "Tenuto is off."
    scheme = choices.precision
    if scheme == FROM_ARTIFACT:
        scheme = artifacts.scheme_of(choices.artifact)
    quantized = "Layers stay in full precision" if scheme == OFF else f"Layers run in {scheme}"
    if choices.speedup > 1:
        return f"{quantized}, and {_skipped(choices, choices.speedup)}."
    if choices.cache == OFF:
        return f"{quantized}, without a cache."
    found = artifacts.find(choices.artifact)
    made = None if found is None else artifacts.load(found)
    what, computed = cache_of(choices, made), share(choices, made)  # of a run of 20 steps
    reused = f"about {computed:.0%} of the blocks"
    if "speedup" in what:
        rest = f"; where none can be, as under Euler a, {reused} are computed" * (computed < 1)
        return f"{quantized}, and {_skipped(choices, what['speedup'])}{rest}."
    if choices.cache in RULES:
        return f"{quantized}, and one step in {choices.speed:g} is computed whole: {reused}."
    return f"{quantized}, and the cache schedule at speed {choices.speed:g} computes {reused}."


def _skipped(choices: Choices, speedup: float) -> str:
    """Of whole calls: how many, when, and by whose forecast."""
    found = artifacts.find(choices.artifact)
    own = found is not None and found.header.get("forecast")
    whose = "" if own else f", by a forecast that ships and was {FOREIGN}"
    share = f"about {1 - 1 / speedup:.0%} of the model's calls are skipped"
    return f"{share}, in runs of {SHORTEST} steps or more{whose}"


def status_html(choices: Choices | None = None, warning: str = "") -> str:
    """The status line. It is announced when it changes."""
    try:
        text = forecast(choices) if choices is not None else ""
    except TenutoError as error:
        text, warning = "", str(error)
    last = "; ".join(layers(session.report))
    facts = f"Last image, in {hosts.detect()}: {last}." if last else f"Host: {hosts.detect()}."
    said = " ".join(filter(None, [escape(text), escape(facts)]))
    alarm = f"<strong>Warning: {escape(warning)}</strong> " if warning else ""
    return f'<div role="status" aria-live="polite">{alarm}{said}</div>'


def facts() -> dict[str, Any]:
    """The status as plain data, for the API."""
    report = session.report
    return {
        "host": hosts.detect(),
        "attached": session.installed is not None,
        "last": {
            "computed": report.computed, "held": report.reused, "cache_bytes": report.bytes,
            "calls": report.calls, "skipped": report.skipped, "predicted": report.predicted,
            "layers": report.layers, "execution": report.how, "lora_layers": report.lora,
            "speedup": report.speedup, "notes": report.notes, "text": under_picture(report),
        },
        "caches": [SHORT[c] for c in CACHES],
    }  # fmt: skip
