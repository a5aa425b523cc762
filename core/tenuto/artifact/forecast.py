"""What an artifact says of its forecast: the kernel, the speedup by default, measured scores."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..caching import AT_ONE, MOST, Forecast, Speedup, check_speedup
from ..errors import ArtifactError, TenutoError
from ..sampling import OutputKernel
from .header import WRONG

if TYPE_CHECKING:
    from .artifact import Artifact


def kernel_of(artifact: Artifact) -> OutputKernel | None:
    """The kernel of the outputs, from which a forecast is planned; None where there is none."""
    facts, values = artifact.header.get("forecast"), artifact.tensors.get("forecast/kernel")
    if facts is None and values is None:
        return None
    try:
        if facts is None or values is None or values.dtype is not values.double().dtype:
            raise ValueError("header and tensor belong together")
        found = OutputKernel.of(values, facts)
        scores_of(facts)
        if facts.get("default") is not None:
            check_speedup(float(facts["default"]))
        return found
    except (TenutoError, *WRONG) as error:
        raise ArtifactError("The artifact is damaged: its forecast has no kernel.") from error


def default_speedup(artifact: Artifact) -> float | None:
    """The speedup of the forecast where nobody says one; None: nothing is skipped then."""
    if kernel_of(artifact) is None:
        return None
    found = artifact.header["forecast"].get("default")
    return None if found is None else float(found)


def set_default(artifact: Artifact, speedup: Speedup | None) -> Artifact:
    """`artifact`, whose forecast is used at this speedup where nobody says one; "auto" is resolved.

    None changes nothing. TenutoError where it has no forecast.
    """
    if speedup is None:
        return artifact
    kernel = kernel_of(artifact)
    if kernel is None:
        raise TenutoError(
            "Nothing can be skipped by default: a forecast needs a pipeline of one denoiser whose "
            "sampler adds no noise of its own."
        )
    artifact.header["forecast"]["default"] = _speedup_of(kernel, speedup)
    return artifact


def scores_of(facts: dict[str, Any]) -> dict[int, tuple[float, float | None]]:
    """What was measured, by the number of skipped calls: (PSNR in dB, predicted error or None).

    facts: the header's `forecast`. One of WRONG where it is damaged.
    """
    found = {}
    for row in facts.get("measured", {}).get("scores", []):
        error = row.get("predicted")
        numbers = [float(row["psnr_db"]), *([] if error is None else [float(error)])]
        if not all(map(math.isfinite, numbers)) or not 0 < int(row["skipped"]) < 10_000:
            raise ValueError("no such score")
        found[int(row["skipped"])] = numbers[0], None if error is None else numbers[1]
    return found


def at_one(facts: dict[str, Any]) -> float:
    """The PSNR in dB that goes with a predicted error of 1: as measured, else as usual."""
    rows = (row for row in scores_of(facts).values() if row[1])
    found = [db + 10 * math.log10(error) for db, error in rows if error and error > 0]
    return median(found) if found else AT_ONE


def joined_forecast(one: Artifact, other: Artifact) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `forecast` of two artifacts in one, as (header, tensors), each empty where it has none.

    The kernel of more images counts, then the one that was measured; else the other's. The default
    is the other's, if it has one.
    """
    known = [a for a in (other, one) if a.header.get("forecast")]
    if not known:
        return {}, {}
    best = max(known, key=lambda a: _worth(a.header["forecast"]))  # the first of equal ones
    facts = dict(best.header["forecast"])
    defaults = [a.header["forecast"].get("default") for a in known]
    default = next((d for d in defaults if d is not None), None)
    facts |= {} if default is None else {"default": default}
    tensors = {k: v for k, v in best.tensors.items() if k.startswith("forecast/")}
    return {"forecast": facts}, tensors


def _worth(facts: dict[str, Any]) -> tuple[int, bool]:
    return int(facts["images"]), "measured" in facts


def _speedup_of(kernel: OutputKernel, speedup: Speedup) -> float:
    """A speedup as a number: of the recorded steps' own plan where it is "auto"."""
    check_speedup(speedup, MOST)
    if isinstance(speedup, str):
        plan = Forecast(kernel, speedup).plan(kernel.timesteps)
        return math.floor(1e4 * len(plan.timesteps) / max(1, plan.calls)) / 1e4  # never a call less
    return float(speedup)
