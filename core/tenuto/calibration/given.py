"""What a user gives where calibration wants a scheme or a recording: names and prompts do too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import SchemeError, TenutoError
from ..numerics import Recipe, Scheme, named
from ..progress import Progress
from ..sampling import Trajectory, record, repeated
from ..sampling.loading import Defaults, defaults
from .presets import Preset


def scheme_of(given: Scheme | Recipe | str) -> Scheme | Recipe:
    """A scheme or recipe, or the scheme of that name; else SchemeError."""
    if isinstance(given, str):
        return named(given.lower())
    if not isinstance(given, Scheme | Recipe):
        raise SchemeError(f"A scheme, its name or a recipe is expected, not {_kind(given)}.")
    return given


def trajectory_of(
    model: Any,
    given: Trajectory | Sequence[str],
    batch: int,
    count: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
    schedule: Mapping[str, Any] | None = None,
) -> Trajectory:
    """A recording, or a new one of a pipeline's `prompts`.

    count: how many of the prompts are recorded (all), `batch` at a time. schedule: of the artifact
    whose steps, guidance and call are repeated; else they are the pipeline's own. TenutoError if it
    is neither a recording nor prompts, or if the model takes none.
    """
    if isinstance(given, Trajectory):
        return given
    prompts = isinstance(given, list | tuple) and all(isinstance(p, str) for p in given)
    if not prompts or not given:
        raise TenutoError(f"A recording is expected, record(model, prompts), not {_kind(given)}.")
    if isinstance(model, nn.Module):
        raise TenutoError("A bare denoiser takes no prompts: give it record(model, sample=fn).")
    usual = defaults(model) if schedule is None else Defaults.read(dict(schedule))
    return record(
        model, list(given)[:count], steps=usual.steps, guidance=usual.guidance, batch=batch,
        call=repeated(schedule or {}, None), seed=seed, on_progress=on_progress,
    )  # fmt: skip


def prompts_needed(scheme: Scheme | Recipe, effort: Preset, rounding: str | None = None) -> int:
    """How many prompts `quantize` makes use of: those of one batch, or all of the effort's.

    One run shows every step, which is all that the timestep decides. More are only of use where an
    algorithm rounds on what layers see, or where the ranges of activations are stored.
    """
    every = needs_every_prompt(scheme, effort, rounding)
    return effort.prompts if every else min(effort.batch, effort.prompts)


def needs_every_prompt(
    scheme: Scheme | Recipe, effort: Preset, rounding: str | None = None
) -> bool:
    """Whether an algorithm looks at inputs of layers, or ranges of activations are stored."""
    if isinstance(scheme, Recipe):
        schemes = [rule.scheme for rule in scheme.rules if rule.scheme is not None]
        algorithms = [rule.algorithm for rule in scheme.rules]
    else:
        schemes = [scheme]
        algorithms = [effort.rounding(rounding, scheme)] if scheme.weight.bits < 8 else []
    seen = any(getattr(algorithm, "needs_inputs", False) for algorithm in algorithms)
    stored = any(s.stored for s in schemes)
    return seen or stored


def _kind(given: Any) -> str:
    return "nothing" if given is None else f"a {type(given).__name__}"
