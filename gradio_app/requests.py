"""What a calibration or a comparison is asked for, checked: by page and API, and when resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tenuto.caching import DEFAULT_FORECAST
from tenuto.calibration import ENCODERS, QUANTIZE, ROUTER, Check
from tenuto.errors import TenutoError

from .call import checked, kept, recalled
from .given import given, real, whole, words
from .loras import chosen as chosen_loras
from .loras import kept as kept_loras
from .places import SHIPPED, Places
from .speedup import asked

LINES = 2**20  # characters of a list of prompts
CHOSEN = ("scheme", "preset", "text_encoder", "method", "rounding")
PARTS = {QUANTIZE: 2, ROUTER: 2}  # each records first; see `worker.calibrate`
HOW = ("reuse", "steps", "guidance", "seed", "iterations", "prompts_text")
FIRST = 10_000  # seed of a comparison, where none is given
NOTHING = "Choose one artifact or more, or a speedup, to compare with full precision."
STEPS = ("The number of steps", 1, 1000)
COUNT = {"least": 1, "most": 512}  # of images in a comparison
SHOWN = 24  # images of a comparison that can be looked at
BATCH = 4  # of a comparison: large enough, and a Stop is never far


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
        "steps": given(how["steps"], whole, *STEPS),
        "guidance": given(how["guidance"], real, "Guidance", 0, 1000),
        "seed": given(how["seed"], whole, "The seed", 0, 2**53, absent=0),
        "prompts_text": words(how["prompts_text"], "The list of prompts", LINES),
        "iterations": given(how["iterations"], whole, "The number of iterations", 1, 10**6),
        "call": kept(found, places.inputs) if keep else found,
    }  # fmt: skip


def comparison(
    places: Places,
    model: str,
    artifacts: Sequence[str],
    count: float,
    steps: Any,
    guidance: Any,
    seed: float | None,
    execution: str,
    prompts: str,
    call: Any,
    speedup: Any,
    loras: Any,
) -> dict[str, Any]:
    """The request of a comparison, but for its folder and the device; TenutoError if it cannot be.

    The arguments are those of `Bench.compare`. Images are written to the folder of inputs.
    """
    from tenuto.runtime import check_execution

    check_execution(execution)
    listed = isinstance(artifacts, list | tuple)
    if not listed or not all(isinstance(name, str) for name in artifacts):
        raise TenutoError(NOTHING)
    lines, inputs = words(prompts, "The list of prompts", LINES), places.inputs
    files = {name: places.artifact(name) for name in dict.fromkeys(artifacts)}
    place, count_of = places.model(model), given(steps, whole, *STEPS)
    skipping = asked(place, files.values(), speedup)
    if not files and skipping is None:
        raise TenutoError(NOTHING)
    shown = {name.removeprefix(SHIPPED): name for name in files} or {DEFAULT_FORECAST: ""}
    return {
        "model": place, "shown_model": model, "inputs": str(inputs),
        "call": kept(checked(place, call, inputs), inputs),
        "loras": kept_loras(chosen_loras(places, place, loras)),
        "artifacts": {s: str(files[n]) if n else None for s, n in shown.items()},
        "names": shown,
        "count": whole(count, "The number of images", COUNT["least"], COUNT["most"]),
        "steps": count_of, "guidance": given(guidance, real, "Guidance", 0, 1000),
        "seed": given(seed, whole, "The seed", 0, 2**53, absent=FIRST),
        "execution": execution, "shown": SHOWN, "batch": BATCH, "prompts": None,
        "prompts_text": lines, "speedup": skipping,
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
