"""`check`: what calibration would make of a model and what would stop it, before anything runs."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...caching import SHORTEST, Facts, candidates
from ...errors import SHORT, TenutoError
from ...model import (
    Backbone,
    Describe,
    denoiser_of,
    describing,
    device_and_dtype,
    encoders_of,
    hosts_of,
)
from ...model import describe as backbone_of
from ...numerics import Recipe, Scheme, schemes
from ...sampling import (
    PipelineCall,
    Sample,
    Skeleton,
    check_steps,
    guidance_name,
    skeleton,
    wanted_prompts,
)
from ...sampling.loading import defaults
from ...sampling.opened import opened
from ...text import printable
from ..costs import images_of, layer_costs
from ..given import needs_every_prompt, prompts_needed, scheme_of
from ..presets import Preset, effort
from ..route_job import DEFAULT_REUSE, SPREADS
from ..router.effort import PRESETS, calls_of_search
from . import estimates, problems
from .file_size import size_of
from .layers import Sorted, parameters, weights_of
from .peak import peaks
from .report import QUANTIZE, ROUTER, USES, Check, Problem
from .trial import first_inputs, trial


@dataclass(frozen=True)
class Asked:
    """What is to be calibrated, and how. stored: bytes of a model that is not loaded."""

    pipe: Any
    denoiser: nn.Module
    backbone: Backbone
    scheme: Scheme | Recipe
    effort: Preset
    router: str
    rounding: str | None
    prompts: tuple[str, ...]
    steps: int
    guidance: float | None
    call: dict[str, Any]
    sample: Sample | None
    device: torch.device
    stored: Mapping[str, int] | None

    def pipeline_call(self) -> PipelineCall | None:
        """The pipeline's call, checked; None of a bare denoiser. TenutoError says what is wrong."""
        if isinstance(self.pipe, nn.Module):
            return None
        check_steps(self.pipe, self.steps)
        prompts = wanted_prompts(self.pipe, self.prompts, self.call)
        return PipelineCall(self.pipe, prompts, self.steps, self.guidance, self.call)


def check(
    model: Any,
    *,
    describe: Describe | None = None,
    scheme: Scheme | Recipe | str = "w8a8",
    text_encoder: bool = False,
    preset: str = "quick",
    rounding: str | None = None,
    prompts: Sequence[str] = ("",),
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    sample: Sample | None = None,
    device: Any = None,
    run: bool = False,
) -> Check:
    """What calibration would make of `model`, what it would take, and what would stop it.

    model: a pipeline, a denoiser, or, without loading it, a folder in diffusers format, a hub id
    that was downloaded, a checkpoint in a single file or "demo:NAME". Everything else is what the
    functions take that do the work; text_encoder: whether text encoders are to be quantized too.
    Nothing of the model runs, unless `run` is True: then it generates up to its first call of the
    denoiser, which is timed; a bare denoiser takes `sample` for that. What is wrong with the model,
    the call or the machine is in `problems` of the result; TenutoError where the question is wrong.
    """
    chosen, wanted, given = effort(preset), scheme_of(scheme), _given(model)
    chosen.rounding(rounding, wanted if isinstance(wanted, Scheme) else None)
    lifeless = given if isinstance(given, Skeleton) else None
    pipe = given if lifeless is None else lifeless.pipe
    try:
        describing(pipe, describe)
        denoiser = denoiser_of(pipe)
        backbone = backbone_of(denoiser)
    except TenutoError as error:
        return Check(_title(pipe), problems=(Problem(str(error), USES),))
    usual = defaults(pipe if lifeless is None else lifeless.folder)
    asked = Asked(
        pipe, denoiser, backbone, wanted, chosen, preset, rounding, tuple(prompts),
        usual.steps if steps is None else steps,
        usual.guidance if guidance is None else guidance, dict(call or {}), sample,
        _device(denoiser, device), None if lifeless is None else lifeless.stored,
    )  # fmt: skip
    found = _checked(asked, text_encoder, lifeless.complaints if lifeless else ())
    if run and not found.stopping():
        if lifeless is not None:
            raise TenutoError("A model that is not loaded cannot run: load it, or leave `run` out.")
        if isinstance(pipe, nn.Module) and sample is None:
            raise TenutoError("A bare denoiser needs `sample=fn`, fn(denoiser, seed, batch).")
        return _after_a_trial(asked, found)
    return found


def _given(model: Any) -> Any:
    """A pipeline, a denoiser, or the skeleton of what a name or a folder says."""
    if not isinstance(model, str | Path):
        return model
    found = skeleton(opened(model))
    if found is None:
        raise TenutoError(f"What {model} is, only loading it tells: load it, and check that.")
    return found


def _title(pipe: Any) -> str:
    return type(pipe).__name__


def _device(denoiser: nn.Module, asked: Any) -> torch.device:
    """Where calibration would run."""
    if asked is not None:
        return torch.device(asked)
    place = device_and_dtype(denoiser)[0]
    if place.type != "meta":
        return place
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- what there is --------------------------------------------------------------------------------


def _checked(asked: Asked, text_encoder: bool, complaints: Sequence[str]) -> Check:
    denoiser, backbone = asked.denoiser, asked.backbone
    layers = Sorted(denoiser, backbone, asked.scheme)
    known = backbone.family != "generic"
    weights = weights_of(denoiser, backbone) | {"quantized": layers.quantized}
    found = Check(
        type(denoiser).__name__,
        None if isinstance(asked.pipe, nn.Module) else _title(asked.pipe),
        backbone.family,
        known,
        weights,
        asked.scheme.name if isinstance(asked.scheme, Scheme) else "a recipe",
        layers.schemes,
        tuple({"why": why} | facts for why, facts in layers.floats.items()),
        backbone.temporal if known or backbone.temporal else None,
        len(backbone.blocks),
        dict(Counter(branch.kind for branch in backbone.branches)),
        dict(_encoders(asked.pipe)),
        problems.further(asked.pipe, denoiser),
        hosts_of(denoiser),
        estimates.memory(asked.pipe, asked.device, asked.stored) | _peaks(asked, text_encoder),
        size=size_of(denoiser, backbone, asked.scheme),
    )
    wrong = [*(Problem(sentence, USES) for sentence in complaints), *_problems(asked, found)]
    if text_encoder:
        able, loaded = any(f["quantizable"] for f in found.encoders.values()), asked.stored is None
        wrong += problems.of_encoders(_title(asked.pipe), asked.pipe, able, loaded)
    found = replace(found, problems=tuple(wrong))
    if found.stopping(QUANTIZE) and found.stopping(ROUTER):
        return found
    time = estimates.time_of(asked.pipe, _calls(asked), asked.call, asked.device)
    return replace(found, time=time)


def _peaks(asked: Asked, encoders: bool) -> dict[str, int]:
    given, some = (asked.scheme, asked.effort, asked.rounding), [p for p in asked.prompts if p]
    count = prompts_needed(*given)
    rows = min(count, len(some) or count) * asked.steps * _halves(asked)
    return peaks(
        asked.pipe, asked.denoiser, asked.backbone, asked.call, rows, asked.stored, asked.device,
        rounds=needs_every_prompt(*given), encoders=encoders,
    )  # fmt: skip


def _encoders(pipe: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, facts) of each text encoder."""
    for name, encoder in encoders_of(pipe).items():
        why, count = None, 0
        try:
            count = Sorted(encoder, backbone_of(encoder), schemes.W8A16).quantized
        except TenutoError as error:
            why = str(error)
        if why is None and not count:
            why = "none of its layers can be quantized"
        yield name, {
            "class": type(encoder).__name__, "weights": parameters(encoder),
            "quantizable": why is None, "why": why,
        }  # fmt: skip


def _problems(asked: Asked, found: Check) -> Iterator[Problem]:
    """In the order in which a user would meet them."""
    weights = found.weights
    passed = max(1, weights["all"] - weights["time-only"])
    yield from problems.of_model(asked.denoiser, asked.stored is None)
    yield from problems.refused(USES, asked.pipeline_call)
    yield from problems.of_layers(weights["all"], weights["quantized"])
    yield from problems.of_branches(found.model, asked.backbone, weights["branches"] / passed)
    yield from problems.of_steps(asked.steps)
    yield from problems.of_machine(found.memory)
    yield from problems.of_pipeline(asked.pipe, asked.denoiser)


# --- what it takes --------------------------------------------------------------------------------


def _calls(asked: Asked) -> dict[str, estimates.Calls]:
    """Calls of the denoiser that each use makes, as `costs.py` has them."""
    given, halves = (asked.scheme, asked.effort, asked.rounding), _halves(asked)
    batch, every = asked.effort.batch, needs_every_prompt(*given)
    recorded, search = prompts_needed(*given) * asked.steps, isinstance(asked.scheme, Scheme)
    parts = layer_costs(recorded, batch, replays=every, stored=False, search=search)
    images = recorded + sum(parts.values()) + _of_forecast(asked)
    found = {QUANTIZE: estimates.Calls(images * halves, -(-images // batch))}
    names = tuple(branch.name for branch in asked.backbone.branches)
    if names and asked.steps > 1:
        plan = PRESETS[asked.router]
        times = tuple(float(t) for t in range(asked.steps, 0, -1))
        tables = candidates(DEFAULT_REUSE, Facts(times, names, (1.0,) * asked.steps))
        searched = calls_of_search(plan, asked.steps, DEFAULT_REUSE, len(tables) + len(SPREADS))
        made = round(sum(searched.values()) + asked.steps)
        found[ROUTER] = estimates.Calls(made * plan.batch * halves, made)
    return found


def _of_forecast(asked: Asked) -> int:
    """Calls with one image that measuring a forecast takes, where that is done unasked."""
    bare = isinstance(asked.pipe, nn.Module) or not isinstance(asked.scheme, Scheme)
    if bare or asked.steps < SHORTEST:
        return 0
    images = images_of(asked.steps)
    cheap = estimates.is_cheap(asked.pipe, images, asked.call, asked.device)
    return images + 2 * asked.steps * asked.effort.batch if cheap else 0


def _halves(asked: Asked) -> int:
    """2 where guidance calls the denoiser with and without the prompt, else 1."""
    own = inspect.signature(type(asked.pipe).__call__).parameters
    name = guidance_name({key: p.default for key, p in own.items()})
    config: Any = getattr(asked.denoiser, "config", None) or {}
    if name is None or config.get("guidance_embeds"):
        return 1
    value = own[name].default if asked.guidance is None else asked.guidance
    return 2 if isinstance(value, int | float) and value > 1 else 1


def _after_a_trial(asked: Asked, found: Check) -> Check:
    """`found` with what one call of the denoiser says, or with why there was none."""
    try:
        inputs = first_inputs(asked.denoiser, asked.pipeline_call(), asked.sample)
        seen = trial(asked.denoiser, asked.backbone, inputs, asked.device)
    except (TenutoError, RuntimeError) as error:  # the second is torch's, out of memory too
        said = str(error) if isinstance(error, TenutoError) else f"The model cannot run: {error}"
        return replace(found, problems=(*found.problems, Problem(printable(said, SHORT), USES)))
    how = f"from one call of the denoiser: {seen.seconds:.3g} s a row, {seen.share:.0%} in branches"
    weights = dict(found.weights)
    if seen.temporal and not asked.backbone.temporal:
        weights["time-only"] = parameters(asked.denoiser, seen.temporal)
    worth = problems.of_branches(found.model, asked.backbone, seen.share)
    return replace(
        found,
        temporal=seen.temporal,
        weights=weights,
        time=estimates.spread(seen.seconds, _calls(asked), how),
        problems=(*found.problems, *worth),
    )
