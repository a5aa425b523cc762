"""`compare`: what an artifact costs and what it buys, measured.

Every number that the project shows anywhere comes from here or from what is named in `__all__`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ..artifact import Artifact
from ..caching import AUTO, DEFAULT_FORECAST, Speedup
from ..errors import TenutoError
from ..model import (
    Describe,
    all_frozen,
    denoiser_of,
    describing,
    device_and_dtype,
    multiply_adds,
    parts_of,
    refuse_cache,
)
from ..progress import Progress, Shown, shown
from ..resources import prompts as shipped_prompts
from ..runtime import Calls, Latency, attach, check_execution, check_free, latency, percentile
from ..sampling import Sample, one_by_one
from ..sampling.loading import defaults
from .bf16 import NATIVE
from .comparison import Comparison
from .encoder_states import hidden_distance
from .environment import surroundings
from .lpips import lpips
from .memory import PeakMemory, resident_weight_bytes
from .metrics import frechet_distance, kernel_distance, psnr, ssim
from .paired_runs import Generated, distances, generate_in_turns, split
from .repeat import as_calibrated
from .ways import ARTIFACT, BF16, FULL, Facts, facts_of, first_calls, ways_of

__all__ = [
    "Comparison", "Generated", "Latency", "PeakMemory", "compare", "compare_all",
    "frechet_distance", "generate_in_turns", "kernel_distance", "latency", "lpips",
    "multiply_adds", "percentile", "psnr", "resident_weight_bytes", "ssim",
]  # fmt: skip

FIRST_SEED = 10_000  # far from the seeds of calibration


def compare(
    model: Any,
    artifact: Artifact | str | Path | None = None,
    prompts: Sequence[str] | str | None = None,
    *,
    count: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = FIRST_SEED,
    sample: Sample | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    execution: str = "int8",
    describe: Describe | None = None,
    speedup: Speedup | None = None,
    compile: bool = False,
    graphs: bool | str = "auto",
    on_progress: Shown = True,
) -> Comparison:
    """Generate `count` images with `model`, with `artifact` attached and in bf16, at equal seeds.

    A pipeline gets `prompts` (else the shipped "evaluation" list), the artifact's own steps and
    guidance, and is called as it was for calibration, unless `steps`, `guidance` and `call` (as in
    `record`) say otherwise; images have to be given again. Each frame of a video counts as an
    image, and videos come one at a time, like what is made of an image. A bare denoiser takes
    `sample(denoiser, seed, batch)`, which runs one trajectory; its steps are counted, `guidance` is
    only noted. The three take turns, a few batches each: times are compared side by side. `device`
    moves the model there for the call. `execution` is that of `attach`: "int8" measures the
    artifact's own arithmetic; so are `describe` and `speedup`, which may be compared without an
    artifact. `compile` and `graphs` are those of `attach` too, and of the model without it: each
    turn then has a batch more, not timed, in which blocks are compiled and calls captured. The
    model is as it was afterwards, whatever happens. on_progress: as in `quantize`.
    """
    describing(model, describe)
    if artifact is None and speedup is None:
        raise TenutoError("Say what to compare: an artifact or a speedup.")
    if artifact == DEFAULT_FORECAST and speedup is None:
        speedup = AUTO
    with shown(on_progress, "Comparing") as told:
        found, _ = compare_all(
            model, {ARTIFACT: artifact}, prompts, count=count, steps=steps, guidance=guidance,
            call=call, seed=seed, sample=sample, batch=batch, device=device, execution=execution,
            speedup=speedup, compile=compile, graphs=graphs, on_progress=told,
        )  # fmt: skip
    return found[ARTIFACT]


def compare_all(
    model: Any,
    artifacts: Mapping[str, Artifact | str | Path | None],
    prompts: Sequence[str] | str | None = None,
    *,
    count: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = FIRST_SEED,
    sample: Sample | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    execution: str = "int8",
    speedup: Speedup | None = None,
    compile: bool = False,
    graphs: bool | str = "auto",
    floor: bool = True,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Comparison], dict[str, Generated]]:
    """`compare` for several artifacts of one model; full precision and bf16 are generated once.

    Steps, guidance and call are the first artifact's unless given (None: the model's own); `floor`:
    bf16 too. Returns the comparisons by name, and the images: so, `FULL`, `BF16`.
    """
    if count < 1 or batch < 1:
        raise TenutoError(f"There is nothing to compare in {count} images, {batch} at a time.")
    check_execution(execution)
    how = Calls.asked(compile, graphs)
    denoisers = parts_of(model)
    known = _checked(denoisers, model, artifacts)
    given, lines = sample is not None, prompts or shipped_prompts("evaluation")
    lines = (lines,) if isinstance(lines, str) else tuple(lines)
    if sample is None:
        schedule = next(iter(known.values())).header["schedule"]
        steps, guidance, call, sample = as_calibrated(model, schedule, lines, steps, guidance, call)
        batch = 1 if one_by_one(model, call) else batch
    batches = split(seed, count, batch)
    with _on(model, device), all_frozen(denoisers.values()), torch.no_grad():
        first, seen = first_calls(model, sample, *batches[0], whole=given)
        facts = facts_of(model, known, first)
        more = {"execution": execution, "speedup": speedup, "compile": compile, "graphs": graphs}
        warm, put_on = _warm(sample, batches[0], how), partial(attach, model, **more)
        ways = ways_of(model, known, first, facts, put_on, floor, how, warm)
        generated = generate_in_turns(ways, sample, batches, on_progress)
        far = {} if given else {n: hidden_distance(model, a, lines, call) for n, a in known.items()}
        taken = {"steps": seen if given else steps, "guidance": guidance}
        run = surroundings(denoisers[""]) | taken
    run |= {"count": sum(map(len, generated[FULL].batches)), "batch": batch, "seed": seed}
    run |= {"compiled": how.compile, "graphs": how.graphs}
    return {
        name: Comparison(
            **_distances(generated, name),
            **_costs(generated, name, facts[name]),
            **run,
            encoders=far.get(name, {}),
        )
        for name in known
    }, generated


def _checked(
    denoisers: Mapping[str, Any],
    model: Any,
    artifacts: Mapping[str, Artifact | str | Path | None],
) -> dict[str, Artifact]:
    """The artifacts, which are of this model; ModelError where none can be attached now.

    That is where one is already, where weights are elsewhere or a cache of diffusers is on.
    """
    for denoiser in denoisers.values():
        check_free(denoiser)
        refuse_cache(denoiser, "a comparison with full precision")
    known = {name: _of(model, artifact) for name, artifact in artifacts.items()}
    for artifact in known.values():
        artifact.check(model)
    return known


def _of(model: Any, artifact: Artifact | str | Path | None) -> Artifact:
    """An artifact; where there is none, one of nothing but the model's own settings."""
    if artifact is not None and artifact != DEFAULT_FORECAST:
        return Artifact.of(artifact)
    usual = defaults(model)
    schedule = {"timesteps": [], "steps": usual.steps, "guidance": usual.guidance}
    return Artifact.new(model, schedule)


def _warm(sample: Sample, batch: tuple[int, int], how: Calls) -> Callable[[Any], Any] | None:
    """A run of one batch where something is compiled or captured meanwhile, else None."""
    return (lambda denoiser: sample(denoiser, *batch)) if how.compile or how.graphs else None


@contextmanager
def _on(model: Any, device: torch.device | str | None) -> Iterator[None]:
    """`model` on `device` for the time of the context."""
    before, _ = device_and_dtype(denoiser_of(model))
    if device is None or torch.device(device) == before:
        yield
        return
    try:
        model.to(device)
        yield
    finally:
        model.to(before)


def _distances(generated: dict[str, Generated], name: str) -> dict[str, Any]:
    """How far the artifact's images, and those in bf16, are from the full-precision ones."""
    full, mine, floor = generated[FULL], generated[name], generated.get(BF16)
    equal = distances(lambda a, b: (a == b).flatten(1).all(1), full, mine)
    return {
        "psnr_db": _spread(distances(psnr, full, mine)),
        "ssim": _mean(ssim, full, mine),
        "lpips": _mean(lpips, full, mine),
        "bf16_floor_psnr_db": None if floor is None else _spread(distances(psnr, full, floor)),
        "identical_pictures": int(sum(equal)),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": percentile(values, 50), "p5": percentile(values, 5)}


def _mean(
    distance: Callable[[Tensor, Tensor], Tensor], one: Generated, other: Generated
) -> float | None:
    """The mean of `distance`, or None where it is not defined: images too small, no network."""
    try:
        return mean(distances(distance, one, other))
    except TenutoError:
        return None


def _costs(generated: dict[str, Generated], name: str, facts: Facts) -> dict[str, Any]:
    """Time, memory and what was really executed; a simulated time gives no speed-up."""
    simulated = facts.execution["layers"].get("simulated", 0)
    gain = None if simulated else generated[FULL].latency.over(generated[name].latency)
    ratio, work = facts.reuse()
    plain = generated.get(BF16) if facts.arithmetic == NATIVE else None  # else no time of bf16
    return {
        "reuse_ratio": ratio,
        "reuse_flops": work,
        "whole_calls": bool(facts.calls) and all(not n.rpartition("/")[2] for n in facts.calls),
        "int8_weight_share": facts.int8_share,
        "seconds_per_picture": {
            "float": generated[FULL].per_image,
            "artifact": generated[name].per_image,
            "bf16": None if plain is None else plain.per_image,
        },
        "speedup": None if gain is None else gain.median,
        "speedup_quartiles": None if gain is None else gain.quartiles,
        "resident_weight_bytes": {"float": facts.float_bytes, "artifact": facts.artifact_bytes},
        "peak_memory_bytes": facts.peak,
        "peak_memory_source": facts.peak_source,
        "execution": facts.execution,
        "bf16_arithmetic": facts.arithmetic,
    }
