"""A pipeline called as it was for calibration, so that like is compared with like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import TenutoError
from ..sampling import Sample, repeated, sampler, wanted_prompts


def as_calibrated(
    model: Any,
    schedule: Mapping[str, Any],
    lines: Sequence[str],
    steps: int | None,
    guidance: float | None,
    call: Mapping[str, Any] | None,
) -> tuple[int, float | None, dict[str, Any], Sample]:
    """(steps, guidance, call, the sampler): as asked, else those of an artifact's schedule."""
    if isinstance(model, nn.Module):
        raise TenutoError("A bare denoiser needs `sample=fn`, fn(denoiser, seed, batch).")
    steps = int(schedule["steps"] if steps is None else steps)
    guidance = schedule["guidance"] if guidance is None else guidance
    repeat = repeated(schedule, call)
    prompts = wanted_prompts(model, lines, repeat)
    return steps, guidance, repeat, sampler(model, prompts, steps, guidance, call=repeat)
