"""What a calibration is asked for, checked: by the page, by the API, and when it is resumed."""

from __future__ import annotations

from typing import Any

from tenuto.errors import TenutoError

from .call import checked, kept
from .given import given, real, whole, words
from .places import Places

LINES = 2**20  # characters of a list of prompts
CHOSEN = ("scheme", "preset", "text_encoder", "method", "rounding")
HOW = ("reuse", "steps", "guidance", "seed", "iterations", "prompts_text")


def calibration(
    places: Places, model: str, chosen: dict[str, Any], how: dict[str, Any], call: Any
) -> dict[str, Any]:
    """The request, of `CHOSEN`, `HOW` and the pipeline's own; TenutoError where it cannot be."""
    from tenuto.cli.checks import check_quantization

    if all(value is None for value in (chosen["scheme"], chosen["text_encoder"], how["reuse"])):
        raise TenutoError(
            "Choose a scheme, a route or text encoders: there is nothing to calibrate."
        )
    chosen = {k: None if v is None else words(v, k.capitalize(), 100) for k, v in chosen.items()}
    check_quantization(**chosen)
    folder = places.model(model)
    return {
        "model": folder, "shown_model": model, **chosen,
        "reuse": given(how["reuse"], real, "The share", 0, 1),
        "steps": given(how["steps"], whole, "The number of steps", 1, 1000),
        "guidance": given(how["guidance"], real, "Guidance", 0, 1000),
        "seed": given(how["seed"], whole, "The seed", 0, 2**53, absent=0),
        "prompts_text": words(how["prompts_text"], "The list of prompts", LINES),
        "iterations": given(how["iterations"], whole, "The number of iterations", 1, 10**6),
        "call": kept(checked(folder, call, places.inputs), places.inputs),
    }  # fmt: skip
