"""What quality to expect of a calibration before it is begun: measured, predicted, or not known.

The numbers are those of docs/results.md: medians of 64 prompts, 20 steps, one NVIDIA H200, of each
part alone. Nothing is computed but the prediction of a forecast, from the model's scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tenuto.sampling.loading import defaults

from .speedup import in_words, outlook, scheduler, shipped

MEASURED: dict[str, dict[str, float]] = {  # dB by model and scheme, weights alone
    "demo:transformer": {"w8a8": 48.5, "w4a8": 36.7, "w4a16": 36.3},
    "demo:unet": {"w8a8": 45.4, "w4a8": 34.9, "w4a16": 35.1},
}
REUSED = 0.3  # share of branch calls of the schedule that was measured
ROUTED = {"demo:transformer": 48.2, "demo:unet": 43.3}
HALF = 2  # the speedup that a prediction is shown for
NOT_HERE = "not measured on your model"
HEAD = "Expected quality"


def expected_quality(request: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows (what, in words) on what a calibration asks for, and on skipped calls."""
    model = str(request["shown_model"])
    if request["scheme"] is not None:
        known = {name: table.get(request["scheme"]) for name, table in MEASURED.items()}
        yield f"{HEAD}: weights", _said(model, known)
    if request["reuse"] is not None:
        alike = abs(request["reuse"] - REUSED) < 0.001
        yield (
            f"{HEAD}: cache schedule",
            _said(model, dict(ROUTED) if alike else dict.fromkeys(ROUTED)),
        )
    if request["text_encoder"] is not None:
        yield f"{HEAD}: text encoders", f"{NOT_HERE}; the calibration says how far states are off"
    steps = request["steps"] or defaults(request["model"]).steps
    found = outlook(shipped(request["model"]), steps, HALF, scheduler(request["model"]))
    if found.db is not None:
        where = "" if model in MEASURED else f", {NOT_HERE}"
        yield (
            "With half of the calls skipped",
            f"about {found.db:.0f} dB predicted by the forecast that ships{where}: "
            f"{in_words(found.db).rstrip('.')}",
        )


def _said(model: str, known: Mapping[str, float | None]) -> str:
    """A number that was measured on this model; else, as such, those of the models that ship."""
    own, others = known.get(model), [value for value in known.values() if value is not None]
    if own is not None:
        return f"{own:.1f} dB was measured on this model (64 prompts, 20 steps)"
    if model in known or not others:
        return f"{NOT_HERE if model not in known else 'not measured'}; the tab Compare measures it"
    low, high = min(others), max(others)
    return (
        f"{NOT_HERE}: {low:.0f} to {high:.0f} dB on the two that ship; the tab Compare measures it"
    )
