"""Text encoders in 8 or 4 bits: their weights alone; inputs stay in float, as encoders are run.

Calibration is on prompts, exactly as the pipeline gives them to the encoder: its templates, padding
and masks, and the empty prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..artifact import Artifact, fingerprint, versions
from ..errors import SchemeError
from ..model import describe, encoders_of
from ..numerics import Recipe, Scheme, schemes
from ..progress import Progress, parts
from ..sampling import (
    BATCH,
    Call,
    Trajectory,
    described,
    encoder_calls,
    schedule_of_run,
    unprompted,
)
from ..work import Work, digest
from .algorithms import by_name, names
from .algorithms.tiar import Tiar
from .presets import recipe_for
from .quantize import Job

WIDTHS = {"w8": schemes.W8A16, "w4": schemes.W4A16}
WHOLE = 100_000  # what one encoder is worth in the progress


def encoder_scheme(width: str, method: str) -> Scheme:
    """The scheme of such a width and method; SchemeError names the choices."""
    return _chosen(width, method)[0]


def _chosen(width: str, method: str) -> tuple[Scheme, Any]:
    """The scheme, and the algorithm that rounds to it."""
    try:
        scheme, algorithm = WIDTHS[width], by_name(method, "encoder")
    except (KeyError, SchemeError):
        raise SchemeError(
            f"A text encoder is quantized to {' or '.join(WIDTHS)} by "
            f"{', '.join(names('encoder'))}, not to {width!r} by {method!r}."
        ) from None
    if getattr(algorithm, "smooth", False):
        scheme = Scheme(f"{scheme.name}-{algorithm.name}", replace(scheme.weight, smooth=True))
    return scheme, algorithm


def quantize_encoder(
    pipe: Any,
    width: str,
    prompts: Sequence[str],
    *,
    method: str = "gptq",
    seed: int = 0,
    steps: int = 20,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    device: Any = None,
    work: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Artifact:
    """The weights of every text encoder of `pipe` in 8 or 4 bits, as an artifact to merge with `|`.

    width: "w8" or "w4" (a range per 32 columns). method: an algorithm's name, such as "gptq".
    steps, guidance and call: as in `record`; the header has the schedule of that run, of which the
    denoiser computes one call. `work`, resuming and Cancelled are as in `quantize`.
    """
    scheme = encoder_scheme(width, method)
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    calls = encoder_calls(pipe, prompts, steps=steps, call=call)
    about = {"method": method, "prompts": len(prompts), "seed": seed}
    times = schedule_of_run(pipe, prompts, steps, guidance, unprompted(call))
    schedule = Trajectory(times, [], seed, 1, 1, steps, guidance, call=described(call)).schedule()
    artifact = Artifact.new(pipe, schedule, {"encoder": about})
    artifact.header["encoders"] = {}
    mark = {"job": "encoders", "encoders": sorted(calls), "seed": seed, "scheme": scheme.to_json()}
    shelf = Work(work, mark).path
    notes = parts(on_progress, dict.fromkeys(calls, WHOLE), named=True)
    for name, own in calls.items():
        job = encoder_job(
            encoders_of(pipe)[name], own, width, method, seed=seed, device=device,
            work=shelf and shelf / name, on_progress=notes[name],
        )  # fmt: skip
        fill(artifact, name, encoders_of(pipe)[name], job)
    return artifact


def encoder_job(
    encoder: nn.Module,
    calls: Sequence[Call],
    width: str,
    method: str,
    *,
    seed: int = 0,
    device: Any = None,
    work: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Job:
    """One encoder quantized on `calls`, without a pipeline: `weights` and `errors` by layer."""
    scheme, algorithm = _chosen(width, method)
    backbone = describe(encoder)
    rules = (
        replace(rule, algorithm=rule.scheme and algorithm)
        for rule in recipe_for(scheme, backbone, algorithm).rules
    )
    trajectory = Trajectory((0.0,), list(calls), seed, BATCH, len(calls), 1)
    job = Job(encoder, backbone, Recipe(tuple(rules)), trajectory, device, seed)
    job.maintain("none", Tiar())
    inputs = {
        "job": "encoder", "recipe": job.recipe.to_json(), "seed": seed, "versions": versions(),
        "model": fingerprint(encoder), "calls": [_mark(call) for call in calls],
    }  # fmt: skip
    job.run(Work(work, inputs), on_progress)
    return job


def _mark(call: Call) -> str:
    """What an encoder is asked, as a short text."""
    return digest(call.inputs["input_ids"].tolist())


def fill(artifact: Artifact, name: str, encoder: nn.Module, job: Job) -> None:
    """Put the codes of one encoder, and what is known of them, into the artifact."""
    for layer, q in job.weights.items():
        artifact.tensors |= {f"encoder/{name}.{k}": v for k, v in q.tensors(layer).items()}
    artifact.header["encoders"][name] = {
        "family": job.backbone.family,
        "model_class": type(encoder).__name__,
        "fingerprint": fingerprint(encoder),
    } | job.described()
