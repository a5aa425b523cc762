"""What a calibration is asked for, checked: by the page, by the API, and when it is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tenuto.calibration import ENCODERS, QUANTIZE, ROUTER, Check
from tenuto.errors import TenutoError

from .call import checked, kept, recalled
from .given import given, real, whole, words
from .places import Places

LINES = 2**20  # characters of a list of prompts
CHOSEN = ("scheme", "preset", "text_encoder", "method", "rounding")
PARTS = {QUANTIZE: 2, ROUTER: 2}  # each records first; see `worker.calibrate`
HOW = ("reuse", "steps", "guidance", "seed", "iterations", "prompts_text")


def calibration(
    places: Places,
    model: str,
    chosen: dict[str, Any],
    how: dict[str, Any],
    call: Any,
    keep: bool = True,
) -> dict[str, Any]:
    """The request, of `CHOSEN`, `HOW` and the pipeline's own; TenutoError where it cannot be.

    keep: write its images to the folder of inputs, so that the call is plain data.
    """
    from tenuto.cli.checks import check_quantization

    if all(value is None for value in (chosen["scheme"], chosen["text_encoder"], how["reuse"])):
        raise TenutoError(
            "Choose a scheme, a cache schedule or text encoders: there is nothing to calibrate."
        )
    chosen = {k: None if v is None else words(v, k.capitalize(), 100) for k, v in chosen.items()}
    check_quantization(**chosen)
    folder = places.model(model)
    found = checked(folder, call, places.inputs)
    return {
        "model": folder, "shown_model": model, **chosen,
        "reuse": given(how["reuse"], real, "The share", 0, 1),
        "steps": given(how["steps"], whole, "The number of steps", 1, 1000),
        "guidance": given(how["guidance"], real, "Guidance", 0, 1000),
        "seed": given(how["seed"], whole, "The seed", 0, 2**53, absent=0),
        "prompts_text": words(how["prompts_text"], "The list of prompts", LINES),
        "iterations": given(how["iterations"], whole, "The number of iterations", 1, 10**6),
        "call": kept(found, places.inputs) if keep else found,
    }  # fmt: skip


def uses(request: Mapping[str, Any]) -> tuple[str, ...]:
    """What a calibration is to do, by the names that `check` has for it."""
    wanted = {QUANTIZE: "scheme", ENCODERS: "text_encoder", ROUTER: "reuse"}
    return tuple(use for use, name in wanted.items() if request[name] is not None)


def check_of(
    request: Mapping[str, Any], call: Mapping[str, Any], device: str | None
) -> Iterator[Check | None]:
    """What `tenuto check` says of a calibration; its model is not loaded for it.

    call: that of the request, with its images. Yields None when the configuration is read, then the
    `Check`: None where only loading tells.
    """
    from tenuto.cli.checks import check_quantization
    from tenuto.cli.session import checked as looked_at
    from tenuto.cli.session import sampling_of
    from tenuto.sampling import skeleton

    found = skeleton(request["model"])
    yield None
    if found is None:
        yield None
        return
    wanted, _ = check_quantization(**{key: request[key] for key in CHOSEN})
    sampling = sampling_of(
        request["model"], steps=request["steps"], guidance=request["guidance"], device=device,
        call=call,
    )  # fmt: skip
    yield looked_at(
        found, sampling, wanted, request["text_encoder"] is not None, preset=request["preset"],
        rounding=request["rounding"],
    )  # fmt: skip


def expected(
    places: Places, request: Mapping[str, Any], device: str | None
) -> list[tuple[int, float | None]]:
    """The parts of the work of each use in turn, and the seconds that the check expects, if known.

    TenutoError with what makes a calibration impossible, as far as that can be told now.
    """
    call = recalled(request["call"], places.inputs)
    *_, found = check_of(request, call, device)
    times: dict[str, Any] = {}
    if found is not None:
        for use in uses(request):
            found.refuse(use)
        times = found.time.get("uses", {})
    return [
        (PARTS.get(use, 1), times[use]["seconds"] if use in times else None)
        for use in uses(request)
    ]
