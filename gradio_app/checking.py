"""The check before Start in the tab Calibrate: by itself when what is chosen changes, or asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from tenuto.errors import TenutoError

from . import check_view
from .bench import Bench
from .calibrate_fields import asked
from .quality import expected_quality
from .requests import CHOSEN, HOW, calibration, check_of, uses
from .viewer import QUIET

CHECKING: dict[str, Any] = QUIET | {
    "queue": True, "trigger_mode": "always_last", "concurrency_id": "check",
    "concurrency_limit": 1,
}  # fmt: skip


def follow(bench: Bench, fields: list[Any], check: gr.Button, tab: gr.Tab, said: gr.HTML) -> None:
    """Check anew when the tab is chosen and when model, scheme or what else decides it changes.

    fields: those of `calibration_fields`. A check that is overtaken by another is not shown.
    """
    model, _, scheme, preset, reuse, steps, *_ = fields
    encoder = fields[10]

    def look(*values: Any) -> Iterator[str]:
        yield from looked_at(bench, *values)

    changes = [part.change for part in (model, scheme, preset, encoder)]
    changes += [steps.blur, reuse.release, tab.select]
    gr.on([check.click, *changes], look, fields, said, **CHECKING)


def looked_at(bench: Bench, *values: Any) -> Iterator[str]:
    """What is shown of a check, as it goes on; a calibration that begins ends it.

    values: of the fields.
    """
    try:
        model, _, scheme, preset, reuse, *rest, encoder, method, rounding, call = asked(
            bench, *values
        )
        yield check_view.working(str(model))
        chosen: dict[str, Any] = dict(
            zip(CHOSEN, (scheme, preset, encoder, method, rounding), strict=True)
        )
        how: dict[str, Any] = dict(zip(HOW, (reuse, *rest), strict=True))
        request = calibration(bench.places, model, chosen, how, call, keep=False)
        found = None
        for found in check_of(request, request["call"], bench.settings.device):
            if found is None:
                yield check_view.working(str(model))
                if bench.desk.busy == "calibrate":  # it was checked when it began
                    return
        if found is None:
            yield check_view.unknown()
            return
        yield check_view.report(found, uses(request), [*expected_quality(request)])
    except TenutoError as error:
        yield check_view.impossible(str(error))
