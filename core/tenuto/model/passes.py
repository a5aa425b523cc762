"""Which pass of a step a denoiser call is: what it leaves out, and what is replaced in it.

Guidance by a model that leaves something out (perturbed attention, skipped layers) calls the
denoiser again for the same image at the same step. What that call stores is not the image's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Plain arguments that make a call another pass of the same step, of the same image.
LEFT_OUT = ("skip_layers", "spatio_temporal_guidance_blocks", "isolate_modalities")
PATCHES = ("patches", "patches_replace")  # of ComfyUI's and Forge's `transformer_options`


def which_pass(inputs: Mapping[str, Any]) -> str:
    """What a call with these arguments leaves out or has replaced, in words; "": nothing."""
    left = ((name, inputs.get(name)) for name in LEFT_OUT)
    found = [f"{name}={value}" for name, value in left if value]
    return " ".join([*found, patches_on(inputs.get("transformer_options") or {})]).strip()


def patches_on(options: Mapping[str, Any]) -> str:
    """Which functions a host's patches put where, in words; "": none.

    options: its `transformer_options`. Functions go by their names: many are made anew each step.
    """
    return " ".join(word for kind in PATCHES for word in _words(options.get(kind), kind))


def _words(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in sorted(value.items(), key=lambda item: str(item[0])):
            yield from _words(inner, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _words(inner, f"{place}.{number}")
    elif value is not None:
        made = value if hasattr(value, "__qualname__") else type(value)
        yield f"{place}={made.__module__}.{made.__qualname__}"
