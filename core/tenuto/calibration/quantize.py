"""`quantize`: post-training quantization, block by block, from a recorded trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

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
from ..progress import Progress, Shown, parts, shown
from ..runtime import check_free
from ..sampling import Trajectory, processes, work_in
from ..sampling.loading import defaults
from .by_denoiser import joined, part_seed, recordings, weights_of
from .costs import images_of, layer_costs
from .forecast_scores import measurable, with_scores
from .given import (
    check_place,
    check_recipe,
    needs_every_prompt,
    prompts_needed,
    scheme_of,
    trajectory_of,
)
from .job import Job
from .presets import PRESETS, Preset, effort, recipe_for
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
    on_progress: Shown = True,
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
    take more, they lie in `work`. under: what is skipped in use, a speedup, a cache schedule or a
    recording of `under_cache`: blocks and ranges see calls of such runs. on_progress: is called
    with (done, total, note); True: a bar on a terminal or in a notebook; None or False: nothing.

    Blocks are taken in order: their inputs come from the quantized prefix, their targets from the
    full-precision model. `work` names a folder in which finished blocks are kept; after Ctrl-C,
    Cancelled or a kill, the same call resumes there and ends in the same artifact. Within
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
    settings = {"preset": preset, "device": device, "rounding": rounding, "choice": temporal}
    settings |= {"max_memory": max_memory, "budget": budget, "seen": None}
    with shown(on_progress, "Quantizing") as told:
        notes = parts(processes().told(told), _sizes(model, scheme, trajectory, under, settings))
        count = chosen.batch, prompts_needed(scheme, chosen, rounding)
        known = trajectory_of(model, trajectory, *count, seed, notes["recorded"])
        settings["seen"] = _seen(model, known, under, notes["again"])
        given = recordings(model, known).items()
        makes = {n: partial(_of_denoiser, model, n, scheme, t, seed, **settings) for n, t in given}
        make = partial(joined, makes, weights_of(model), work)
        return _measured(model, known, measure, make, notes["made"], scheme, settings)


def _sizes(
    model: Any,
    scheme: Scheme | Recipe,
    given: Trajectory | Sequence[str],
    under: UnderCache | Trajectory | None,
    settings: Mapping[str, Any],
) -> dict[str, int]:
    """What recording, recording with calls skipped and the rest take, as in `costs.py`."""
    chosen, rounding = effort(settings["preset"]), settings["rounding"]
    if isinstance(given, Trajectory):
        calls, batch, recorded = len(given.calls) * given.batch, given.batch, 0
    elif not isinstance(given, list | tuple) or isinstance(model, nn.Module):
        return {"recorded": 1, "again": 0, "made": 0}  # it will be refused
    else:
        count, batch = prompts_needed(scheme, chosen, rounding), chosen.batch
        calls = recorded = min(count, len(given)) * defaults(model).steps
    again = calls if under is not None and not isinstance(under, Trajectory) else 0
    made = _worth(scheme, chosen, rounding, calls, batch)
    return {"recorded": recorded, "again": again, "made": made}


def _worth(
    scheme: Scheme | Recipe, chosen: Preset, rounding: str | None, calls: int, batch: int
) -> int:
    """What `_of_denoiser` takes of all denoisers, as in `costs.py`."""
    every = needs_every_prompt(scheme, chosen, rounding)
    search = isinstance(scheme, Scheme)
    return sum(layer_costs(calls, batch, replays=every, stored=False, search=search).values())


def _measured(
    model: Any,
    trajectory: Trajectory,
    wanted: bool | None,
    make: Callable[[Progress | None], Artifact],
    on_progress: Progress | None,
    scheme: Scheme | Recipe,
    settings: Mapping[str, Any],
) -> Artifact:
    """What `make` gives, its forecast measured where that is wanted and can be."""
    if not measurable(model, trajectory, wanted):
        return make(on_progress)
    calls, batch = len(trajectory.calls) * trajectory.batch, trajectory.batch
    worth = _worth(scheme, effort(settings["preset"]), settings["rounding"], calls, batch)
    sizes = {"layers": worth, "forecast": images_of(len(trajectory.timesteps))}
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
    sizes = layer_costs(
        len(job.seen.calls) * trajectory.batch, trajectory.batch, search=search,
        replays=any(getattr(r.algorithm, "needs_inputs", False) for r in job.plan.values()),
        stored=any(r.scheme is not None and r.scheme.stored for r in job.plan.values()),
    )  # fmt: skip
    notes = parts(on_progress, {name: 1000 * size for name, size in sizes.items()})
    job.run(work_in(work, inputs), notes["layers"], notes["ranges"])
    job.fill(artifact, preset).add_forecast(trajectory.kernel)
    if search:
        artifact = with_spared(job, artifact, notes["kept"])
    return with_result(job, artifact, notes["result"])
