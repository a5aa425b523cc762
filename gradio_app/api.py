"""The app's API: what `gradio_client` can call. Each function does what a button does."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import gradio as gr

from tenuto.errors import Cancelled, TenutoError
from tenuto.text import printable

from .bench import Bench
from .exports import begun
from .page import refusal
from .settings import facts


def add(bench: Bench) -> None:
    """Add the functions to the page that is being built; they run one after the other.

    It is called before anything else is added: Gradio names each listener of the page after its
    function, and gives a name that is taken another ending.
    """

    def about() -> dict[str, Any]:
        """Models, artifacts, LoRAs and unfinished calibrations."""
        return _about(bench)

    def generate(
        model: str, prompt: str, seed: float | None, steps: float, guidance: float | None,
        artifact: str | None, beside: bool, call: dict[str, Any] | None = None,
        speedup: float | str | None = None, loras: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Generate an image; the answer has the paths of its files, to be fetched from the app."""
        return bench.generate(
            model, prompt, seed, steps, guidance, artifact or "", beside,
            lambda done, total: None, call, speedup, loras=loras,
        )  # fmt: skip

    def calibrate(options: dict[str, Any]) -> dict[str, Any]:
        """Start a calibration: model, name, scheme, preset, reuse and what `Calibrate` has more."""
        return bench.calibrate(**known(options, CALIBRATE)).facts()

    def resume(name: str) -> dict[str, Any]:
        """Go on with an unfinished calibration."""
        return bench.resume(name).facts()

    def compare(options: dict[str, Any]) -> dict[str, Any]:
        """Start a comparison: model, artifacts, count and what `Compare` has more."""
        return bench.compare(**known(options, COMPARE)).facts()

    def export(model: str, artifact: str, to: str) -> dict[str, Any]:
        """Start an export: to is "comfy", "gguf" or "diffusers"."""
        return begun(bench, model, artifact, to).facts()

    def job(kind: str) -> dict[str, Any]:
        """How far the last job is: kind is one of `JOBS`; of "generate", if it runs."""
        return bench.facts(None, _kind(kind))

    def stop(kind: str) -> dict[str, Any]:
        """Stop the job, if it runs; kind may be "generate" too."""
        bench.stop(None, _kind(kind))
        return bench.facts(None, kind)

    for function in (about, generate, calibrate, resume, compare, export, job, stop):
        limit: dict[str, Any] = {"queue": False} if function in (job, stop, about) else {}
        if function is generate:
            limit = {"concurrency_id": "machine"}
        gr.api(told(function), api_name=function.__name__, **limit)


def _about(bench: Bench) -> dict[str, Any]:
    places = bench.places
    models = places.models()
    return facts(bench.settings) | {
        "models": models,
        "artifacts": {model: places.artifacts(model) for model in models},
        "loras": [*places.loras()],
        "unfinished": places.unfinished(),
    }


JOBS = ("calibrate", "compare", "export", "generate")
KINDS = {str: "a text", bool: "true or false", dict: "an object of options"}
CALIBRATE = {
    "model": "demo:transformer", "name": "my-artifact", "scheme": "w8a8", "preset": "quick",
    "reuse": None, "steps": None, "guidance": None, "seed": 0, "iterations": None, "prompts": "",
    "text_encoder": None, "method": None, "rounding": None, "call": None,
}  # fmt: skip
COMPARE = {
    "model": "demo:transformer", "artifacts": [], "count": 8, "steps": None, "guidance": None,
    "seed": 10_000, "execution": "int8", "prompts": "", "call": None, "speedup": None,
    "loras": "",
}  # fmt: skip


def known(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`options` over `defaults`; TenutoError names what is not known."""
    strange = sorted(set(options) - set(defaults))
    if strange:
        said = printable(", ".join(strange), 60)
        raise TenutoError(f"Unknown: {said}. Known: {', '.join(defaults)}.")
    return defaults | options


def _kind(kind: str) -> str:
    if kind not in JOBS:
        raise TenutoError(f"A job is one of {', '.join(JOBS)}, not {printable(kind, 50)!r}.")
    return kind


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose refusals reach the caller as one sentence, those of wrong types too."""
    kinds = get_type_hints(function)

    @functools.wraps(function)
    def answered(*args: Any, **options: Any) -> Any:
        try:
            given = inspect.signature(function).bind(*args, **options).arguments
            for name, value in given.items():
                _check_type(name, value, kinds[name])
            return function(**given)
        except Cancelled as error:
            raise refusal("Stopped.") from error
        except TenutoError as error:
            raise refusal(str(error)) from error

    return answered


def _check_type(name: str, value: Any, kind: Any) -> None:
    """TenutoError for another type. Numbers are left to those who know their limits."""
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    wanted = tuple(get_origin(one) or one for one in kinds)
    if float not in wanted and not isinstance(value, wanted):
        raise TenutoError(f"{name} is {KINDS[wanted[0]]}, not {printable(json.dumps(value), 50)}.")
