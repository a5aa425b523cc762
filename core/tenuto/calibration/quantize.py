"""`quantize`: post-training quantization, block by block, from a recorded trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..errors import TenutoError
from ..model import (
    Describe,
    check_fused,
    describing,
    parts_of,
)
from ..model import describe as backbone_of
from ..numerics import Recipe, Scheme
from ..progress import Progress, parts
from ..runtime import check_free
from ..sampling import Trajectory, processes, work_in
from .by_denoiser import joined, part_seed, recordings, weights_of
from .forecast_scores import images_of, measurable, with_scores
from .given import (
    check_place,
    check_recipe,
    prompts_needed,
    scheme_of,
    trajectory_of,
)
from .job import Job
from .presets import PRESETS, effort, recipe_for
from .result_check import with_result
from .rounding_errors import with_rounding
from .spared import searched, with_spared
from .temporal.maintenance import check_choice, with_time_only
from .temporal.selection import check_budget
from .under_cache import UnderCache, check_under, mark_of, under_cache

__all__ = ["PRESETS", "Job", "effort", "quantize", "recipe_for"]


def quantize(
    model: Any,
    scheme: Scheme | Recipe | str,
    trajectory: Trajectory | Sequence[str],
    *,
    preset: str = "quick",
    device: Any = None,
    seed: int = 0,
    rounding: str | None = None,
    temporal: str = "auto",
    table_budget: float | None = None,
    describe: Describe | None = None,
    measure: bool | None = None,
    max_memory: int | None = None,
    under: UnderCache | Trajectory | None = None,
    work: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Artifact:
    """Quantize every denoiser of `model` and return the artifact; `model` itself is not changed.

    scheme: a scheme, its name or a recipe. trajectory: a recording, or prompts for a pipeline, of
    which as many are recorded as the scheme needs, with the pipeline's own steps and guidance.
    rounding: how weights below 8 bits round, where `scheme` is no recipe: an algorithm's name,
    such as "gptq"; None: as the preset does. temporal: what becomes of the modules that depend on
    the timestep alone and that the recipe quantizes: "none" (like the rest), "tiar", "table",
    "int8", "select" or "auto"; see `maintenance.py`. table_budget: of "select", bytes of all these
    modules as a share of their tables in fp16; None: half. describe: what the model is made of,
    where no family file says it or says it otherwise; see `describing`. measure: whether the
    forecast is measured: on four images, which takes as long as generating ten, and what rounding
    adds to its steps, in two runs; None: for a model of few products, as `forecast_scores` says.
    max_memory: bytes that all takes at most; None: what is free. Where a block's recorded inputs
    take more, they lie in `work`. under: what is skipped in use, a speedup or a cache schedule, or
    a recording of `under_cache`: blocks and ranges see the calls of runs that skip it.

    Blocks are taken in order: their inputs come from the already quantized prefix, their targets
    from the full-precision model. `work` names a folder in which finished blocks are kept; after
    Ctrl-C, Cancelled or a kill, the same call resumes there and ends in the same artifact. Within
    `launched` several processes share the work, and each gets the artifact.
    """
    describing(model, describe)
    for denoiser in parts_of(model).values():
        check_free(denoiser, hooked=True)
        check_fused(denoiser)
    budget = check_budget(table_budget, check_choice(temporal))
    chosen, scheme = effort(preset), scheme_of(scheme)
    check_recipe(model, scheme, chosen, rounding)
    check_place(work)
    check_under(under, scheme, chosen, rounding)
    if not isinstance(trajectory, Trajectory):
        count = prompts_needed(scheme, chosen, rounding)
        trajectory = trajectory_of(model, trajectory, chosen.batch, count, seed, on_progress)
    settings = {"preset": preset, "device": device, "rounding": rounding, "choice": temporal}
    seen = _seen(model, trajectory, under, on_progress)
    settings |= {"max_memory": max_memory, "budget": budget, "seen": seen}
    makes = {
        name: partial(_of_denoiser, model, name, scheme, own, seed, **settings)
        for name, own in recordings(model, trajectory).items()
    }
    make = partial(joined, makes, weights_of(model), work)
    return _measured(model, trajectory, measure, make, processes().told(on_progress))


def _measured(
    model: Any,
    trajectory: Trajectory,
    wanted: bool | None,
    make: Callable[[Progress | None], Artifact],
    on_progress: Progress | None,
) -> Artifact:
    """What `make` gives, its forecast measured where that is wanted and can be."""
    if not measurable(model, trajectory, wanted):
        return make(on_progress)
    sizes = {"layers": len(trajectory.calls) * trajectory.batch, "forecast": images_of(trajectory)}
    sizes["rounding"] = 2 * len(trajectory.timesteps) * trajectory.batch
    notes = parts(on_progress, sizes)
    made = with_scores(model, make(notes["layers"]), trajectory, notes["forecast"])
    return with_rounding(model, made, trajectory, notes["rounding"])


def _seen(
    model: Any,
    trajectory: Trajectory,
    under: UnderCache | Trajectory | None,
    on_progress: Progress | None,
) -> Trajectory | None:
    """The calls that blocks and ranges see, where those are others than the recorded ones."""
    if under is None:
        return None
    if isinstance(under, Trajectory):
        if under.timesteps != trajectory.timesteps or not under.under:
            raise TenutoError("Under a cache is a recording of under_cache, of the same steps.")
        return under
    return under_cache(model, trajectory, under, on_progress=on_progress)


def _of_denoiser(
    model: Any,
    part: str,
    scheme: Scheme | Recipe,
    trajectory: Trajectory,
    seed: int,
    work: Path | None,
    on_progress: Progress | None,
    *,
    preset: str,
    device: Any,
    rounding: str | None,
    choice: str,
    budget: float,
    max_memory: int | None,
    seen: Trajectory | None,
) -> Artifact:
    """`quantize` of one denoiser, from the recording of its calls."""
    denoiser, chosen = parts_of(model)[part], effort(preset)
    backbone = with_time_only(denoiser, backbone_of(denoiser), trajectory)
    if isinstance(scheme, Recipe):
        recipe = scheme
    else:
        recipe = recipe_for(scheme, backbone, chosen.rounding(rounding, scheme))
    job = Job(denoiser, backbone, recipe, trajectory, device, part_seed(seed, part))
    job.max_memory, job.seen = max_memory, seen or trajectory
    if not job.plan:
        raise TenutoError("No layer of the model matches the recipe.")
    made = {"seed": seed, "device": job.device.type, "calibration": trajectory.about()}
    made |= {} if seen is None else {"under": seen.under}
    artifact = Artifact.new(model, trajectory.schedule(), made, part)
    inputs = {
        "job": "quantize",
        "recipe": recipe.to_json(),
        "seed": seed,
        **({} if seen is None else {"under": mark_of(seen)}),
        "temporal": [choice, asdict(chosen.temporal), *([budget] if choice == "select" else [])],
        "version": artifact.header,
    }
    job.maintain(choice, chosen.temporal, budget)
    search = searched(job, scheme)
    replays = any(getattr(r.algorithm, "needs_inputs", False) for r in job.plan.values())
    share = 100 if replays else 700  # of a thousand: layers that only round are quick
    notes = parts(on_progress, {"layers": 1000 - share, "kept": share if search else 0})
    job.run(work_in(work, inputs), notes["layers"])
    job.fill(artifact, preset).add_forecast(trajectory.kernel)
    if search:
        artifact = with_spared(job, artifact, notes["kept"])
        notes["kept"](1, 1, "")
    return with_result(job, artifact)
