"""The rows of `temporal.py`: one model at one setting, and its time path in every way."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import tenuto as tn
from tenuto.artifact import Artifact
from tenuto.artifact.curve_tables import with_rows
from tenuto.calibration import effort, recipe_for
from tenuto.calibration.algorithms import by_name
from tenuto.calibration.job import Job
from tenuto.calibration.temporal.maintenance import Maintenance
from tenuto.model import denoiser_of
from tenuto.numerics import Format, QTensor, Recipe, Scheme, half
from tenuto.sampling.loading import defaults, load

_ONE = Format(8, symmetric=False, granularity="tensor")
SETTINGS: dict[str, Scheme] = {
    "w8a8": tn.schemes.W8A8, "w4a8": tn.schemes.W4A8,
    "paper": Scheme("w4a8-paper", Format(4, symmetric=False, ranges="mse"), _ONE),
    "alone": tn.schemes.W4A8,
}  # fmt: skip
WHOLE = ("nearest", "reconstructed", "one maximum")
LARGEST = "table, one maximum"
PARTS = ("tiar", "tiar+fsc", "table", "int8", "select 50%", "select 25%", LARGEST)


class Bench:
    """One model at one setting and seed: its recording, and the weights that rows share."""

    def __init__(
        self, name: str, setting: str, seed: int, preset: str, rounding: str, steps: int | None,
        device: str | None,
    ) -> None:  # fmt: skip
        self.setting, self.seed, self.preset, self.rounding = setting, seed, preset, rounding
        self.pipe, self.device = load(name, device), device
        own = defaults(name)
        self.steps, self.guidance = steps or own.steps, own.guidance
        self.denoiser = denoiser_of(self.pipe)
        self.kind, self.scheme = effort(preset), SETTINGS[setting]
        self.spent: dict[Any, tuple[Any, float]] = {}  # of what features are worth

    @cached_property
    def recorded(self) -> tn.Trajectory:
        """What everything is calibrated on."""
        return tn.record(
            self.pipe, tn.prompts("default")[: self.kind.prompts], steps=self.steps,
            guidance=self.guidance, batch=self.kind.batch, seed=self.seed,
        )  # fmt: skip

    def recipe(self, scheme: Scheme, rounding: str, everywhere: bool = False) -> Recipe:
        """Weights by `rounding`, 8-bit ones of the setting too; everywhere: of the time path too.

        In the papers' setting first and last layers are in float, and alone all but the time path.
        """
        backbone, algorithm = tn.describe(self.denoiser), by_name(
            rounding, "denoiser", self.kind.effort
        )  # fmt: skip
        *rules, last = recipe_for(scheme, backbone, algorithm).rules
        if self.setting in ("paper", "alone"):
            rules = [r if r.scheme == scheme else replace(r, scheme=None) for r in rules]
        if everywhere:
            rules = [replace(r, algorithm=algorithm) if r.scheme == scheme else r for r in rules]
        if self.setting == "alone":
            return Recipe((*rules, replace(last, scheme=None)))
        return Recipe((*rules, replace(last, algorithm=algorithm)))

    def quantized(self, recipe: Recipe, temporal: str) -> tuple[Artifact, float]:
        """A whole calibration, and its seconds."""
        start = time.perf_counter()
        made = tn.quantize(
            self.pipe, recipe, self.recorded, preset=self.preset, seed=self.seed,
            temporal=temporal, measure=False,
        )  # fmt: skip
        return made, time.perf_counter() - start

    @cached_property
    def base(self) -> tuple[Artifact, float]:
        """The calibration whose weights rows share: its time path is a table."""
        return self.quantized(self.recipe(self.scheme, self.rounding), "table")

    @cached_property
    def time(self) -> Maintenance:
        """The time path, in full precision."""
        recipe, backbone = self.recipe(self.scheme, "nearest"), tn.describe(self.denoiser)
        job = Job(self.denoiser, backbone, recipe, self.recorded, self.device, self.seed)
        job.maintain("table", self.kind.temporal)
        measured = job.time.worth
        assert measured is not None

        def once(computing: Any, note: Any) -> Any:
            key = frozenset(computing)
            if key not in self.spent:
                start = time.perf_counter()
                worth = measured(computing, note)
                self.spent[key] = worth, time.perf_counter() - start
            return self.spent[key][0]

        job.time.worth = once
        return job.time

    def whole(self, row: str) -> tuple[Artifact, float]:
        """A row with a calibration of its own, and the seconds of it."""
        if row == "reconstructed":
            recipe = self.recipe(self.scheme, self.rounding, everywhere=True)
            return self.quantized(recipe, "none")
        if row == "nearest":
            return self.quantized(self.recipe(self.scheme, "nearest"), "none")
        static = replace(self.scheme, name=f"{self.scheme.name}-static",
                         activation=replace(_ONE, per_step=True))  # fmt: skip
        made, seconds = self.quantized(self.recipe(static, "nearest"), "none")
        to_largest(made.tensors)
        return made, seconds

    def part(self, row: str) -> tuple[Artifact, float, int | None]:
        """The shared weights with the time path of a row; seconds, and bytes if not the file's."""
        base, seconds = self.base
        share = float(row.split()[1].rstrip("%")) / 100 if row.startswith("select") else 0.5
        choice = "table" if row == LARGEST else row.split("+")[0].split()[0]
        path, before = replace(self.time, choice=choice, budget=share), len(self.spent)
        start = time.perf_counter()
        kept = path.quantized(self.seed, lambda *_: None)
        seconds += time.perf_counter() - start
        if choice == "select" and len(self.spent) == before:
            seconds += next(iter(self.spent.values()))[1]
        nbytes = None
        if row == LARGEST:
            nbytes = 0
            for key in [k for k in kept if k.startswith("table/")]:
                kept[key], size = in_int8(kept[key])
                nbytes += size
        static = row != "tiar"
        made = exchanged(base, path, kept, None if static else self.scheme)
        return made, seconds, nbytes


def exchanged(
    base: Artifact, path: Maintenance, kept: dict[str, Tensor], scheme: Scheme | None
) -> Artifact:
    """`base` with the time path that `kept` holds. scheme: of its layers; None: a range a step.

    A stored range that is no longer one a step covers all steps.
    """
    found = Artifact(dict(base.header), dict(base.tensors))
    for key in [k for k in found.tensors if k.startswith("temporal/")]:
        del found.tensors[key]
    found.tensors |= {
        f"temporal/{k.removeprefix('table/')}": t for k, t in kept.items() if k.startswith("table/")
    }
    layers, schemes = dict(base.header["layers"]), dict(base.header["schemes"])
    for name, own in path.schemes.items():
        if f"{name}.qdata" not in kept:
            continue
        weight: Any = path.path.get_submodule(path.path.local(name)).weight
        q = QTensor.from_tensors(kept, name, weight.shape, own.weight)
        ((_, used),) = path.static({name: q}).values()
        used = scheme or used
        schemes[used.name] = used.to_json()
        layers[name] = {"scheme": used.name, "shape": list(weight.shape)}
        found.tensors |= {f"weights/{k}": t for k, t in q.tensors(name).items()}
        if used.stored:
            scale, zero = (kept[f"ranges/{name}.{end}"] for end in ("scale", "zero_point"))
            if scheme is not None:
                low, high = (-zero * scale).amin(), ((255 - zero) * scale).amax()
                scale = ((high - low) / 255)[None]
                zero = (-low / scale).round().clamp(0, 255)
            found.tensors |= {f"ranges/{name}.scale": scale, f"ranges/{name}.zero_point": zero}
    found.header |= {"layers": layers, "schemes": schemes, "temporal": path.header(kept)}
    return found


def to_largest(tensors: dict[str, Tensor]) -> None:
    """Make each stored range symmetric: by the largest absolute value that it covers."""
    for key in [k for k in tensors if k.startswith("ranges/") and k.endswith(".scale")]:
        other = key.removesuffix("scale") + "zero_point"
        scale, zero = tensors[key], tensors[other]
        most = scale * torch.maximum(zero, 255 - zero)
        tensors[key], tensors[other] = most / 127, torch.full_like(zero, 128)


def in_int8(rows: Tensor) -> tuple[Tensor, int]:
    """`rows` (T, ...) with one symmetric range a step: the values, and the bytes of codes."""
    flat = rows.float().flatten(1)
    scale = (flat.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
    return half((flat / scale).round() * scale).view(rows.shape), rows.numel() + 4 * len(rows)


def time_errors(path: Maintenance, made: Artifact) -> dict[str, Tensor]:
    """1 - cosine of each module's outputs, float64 (T,), of what `made` puts in."""
    weights, ranges = made.section("weights"), made.section("ranges")
    some, known = {}, {}
    for name in path.schemes:
        if (facts := made.header["layers"].get(name)) is None:
            continue
        scheme = Scheme.from_json(made.header["schemes"][facts["scheme"]])
        q = QTensor.from_tensors(weights, name, torch.Size(facts["shape"]), scheme.weight)
        some[name] = q, scheme
        if scheme.stored:
            known[name] = ranges[f"{name}.scale"], ranges[f"{name}.zero_point"]
    rows, tables = with_rows(made).section("temporal"), {}
    for name, facts in made.header["temporal"]["modules"].items():
        if facts["kind"] == "table":
            tables[name] = tuple(rows[f"{name}.{i}"] for i in range(len(facts["outputs"])))
    return path.path.errors(some, known, tables)


def time_bytes(path: Maintenance, made: Artifact) -> int:
    """Bytes of the time path's codes, ranges and tables; of what stays in float in 16 bits."""
    starts = [f"{part}/{name}." for name in path.schemes for part in ("weights", "ranges")]
    found = sum(
        t.nbytes for k, t in made.tensors.items()
        if k.startswith("temporal/") or any(k.startswith(start) for start in starts)
    )  # fmt: skip
    modules = made.header["temporal"]["modules"]
    for name in path.schemes:
        if modules[path.path.owner(name)]["kind"] == "float":
            weight: Any = path.path.get_submodule(path.path.local(name)).weight
            found += 2 * weight.numel()
    return found
