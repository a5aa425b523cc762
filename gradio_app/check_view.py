"""What `check` found out about a model before it is calibrated, as a card to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from tenuto.calibration import ENCODERS, QUANTIZE, ROUTER, Check
from tenuto.calibration.check.report import between, gib

from .view import card, on_the_page, table

NAMES = {
    "model": "Model", "family": "Family", "quantized": "Quantized", "in float": "Full precision",
    "time-only": "Time path", "can be reused": "Can be reused", "text encoder": "Text encoder",
    "stays as it is": "Stays as it is", "in hosts": "In ComfyUI and the WebUIs", "memory": "Memory",
    "file": "File",
    QUANTIZE: "Quantizing", ROUTER: "Cache schedule", "estimated": "Estimated",
}  # fmt: skip
OF = {
    QUANTIZE: ("quantized", "in float", "time-only", "file", QUANTIZE),
    ROUTER: ("can be reused", ROUTER), ENCODERS: ("text encoder",),
}  # rows that matter where this is wanted alone  # fmt: skip
UNKNOWN = "Only loading the model tells: it is checked when the calibration begins."


def asking() -> str:
    """Before it is looked at."""
    return card("idle", "Not checked yet.", "What a calibration would take is said here.")


def working(model: str) -> str:
    """While it is looked at."""
    return card("running", "Checking.", f"The configuration of {model} is read.")


def unknown() -> str:
    """Where nothing is known before the model is loaded."""
    return card("idle", "Not checked.", UNKNOWN)


def impossible(sentence: str) -> str:
    """Where what is chosen cannot even be asked for."""
    return card("failed", "It cannot be calibrated.", sentence)


def report(found: Check, uses: Sequence[str], quality: Sequence[tuple[str, str]] = ()) -> str:
    """All that matters to `uses`, which are what the calibration is to do.

    quality: rows on the quality to expect.
    """
    stops, worth = found.stopping(*uses), found.warnings(*uses)
    more = f"{_listed(stops[1:])}{_listed(worth)}{_facts(found, uses, quality)}"
    if stops:
        return card("failed", "It cannot be calibrated.", stops[0], more)
    return card("stopped" if worth else "done", "It can be calibrated.", _costs(found, uses), more)


def _costs(found: Check, uses: Sequence[str]) -> str:
    """Time and memory, as far as they are known."""
    said, times = [], found.time.get("uses", {})
    known = [times[use] for use in uses if use in times]
    if known:
        ends = [sum(one[end] for one in known) for end in ("seconds", "seconds_at_most")]
        said.append(f"It takes {between(*ends)}.")
    if QUANTIZE in uses and found.size.get("codes"):
        codes, whole = found.size["codes"], found.size["in 16 bits"]
        said.append(f"A file of about {gib(codes)}: the model has {gib(whole)} in 16 bits.")
    if found.memory and QUANTIZE in uses:
        free = found.memory["free"]
        left = "" if free is None else f", {gib(free)} free"
        said.append(f"About {gib(found.memory['needed'])} of memory{left}.")
    return " ".join(said)


def _listed(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return f"<ul>{''.join(f'<li>{escape(on_the_page(one))}</li>' for one in sentences)}</ul>"


def _facts(found: Check, uses: Sequence[str], quality: Sequence[tuple[str, str]]) -> str:
    return f'<div class="tenuto-facts">{table([*quality, *_rows(found, uses)])}</div>'


def _rows(found: Check, uses: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Rows of the check under the names that the page has for them, each name once."""
    left_out = {row for use, rows in OF.items() if use not in uses for row in rows}
    last = ""
    for name, value in found.rows():
        if name not in left_out:
            yield "" if name == last else NAMES.get(name, name), value.partition("; --run")[0]
            last = name
