"""`quantize`: post-training quantization, block by block, from a recorded trajectory."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .algorithms.adaround import AdaRound
from .algorithms.nearest import RoundToNearest
from .artifact import Artifact
from .backbone import Backbone, layers
from .errors import SchemeError, TenutoError
from .families import describe
from .numerics import affine
from .patching import denoiser_of, frozen
from .qtensor import QTensor
from .replay import Chain, arguments, in_order
from .scheme import Recipe, Rule, Scheme, schemes
from .trajectory import Progress, Trajectory
from .work import Work

log = logging.getLogger("tenuto")

UNIT = 1000  # what one block is worth in the progress


@dataclass(frozen=True)
class Preset:
    """Effort. prompts and batch: of the recording; rounding: how weights below 8 bits round."""

    prompts: int
    batch: int
    rounding: AdaRound


PRESETS = {
    "quick": Preset(8, 4, AdaRound(iterations=120, batch=16)),
    "standard": Preset(16, 8, AdaRound(iterations=300, batch=16)),
    "thorough": Preset(64, 8, AdaRound(iterations=2000, batch=32)),
}


def effort(name: str) -> Preset:
    """The preset called `name`; SchemeError names the choices."""
    if name not in PRESETS:
        raise SchemeError(f"Unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def recipe_for(scheme: Scheme, backbone: Backbone, rounding: Any = None) -> Recipe:
    """The default recipe: first, last and time-only layers at 8 bits, the rest at `scheme`.

    Weights below 8 bits are rounded by `rounding` (an algorithm), 8-bit ones to nearest.
    """
    nearest = RoundToNearest()
    wide = schemes.W8A16 if scheme.activation is None else Scheme(
        f"w8{scheme.name[2:]}", schemes.W8A8.weight, scheme.activation
    )  # fmt: skip
    rules = [Rule(pattern, None) for pattern in backbone.keep]
    ends = [*backbone.ends, *(f"{name}*" for name in backbone.temporal)]
    if scheme.weight.bits < 8:
        rules += [Rule(pattern, wide, nearest) for pattern in dict.fromkeys(ends)]
    rules.append(Rule("*", scheme, (rounding or nearest) if scheme.weight.bits < 8 else nearest))
    return Recipe(tuple(rules))


def quantize(
    model: Any,
    scheme: Scheme | Recipe,
    trajectory: Trajectory,
    *,
    preset: str = "quick",
    device: Any = None,
    seed: int = 0,
    work: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Artifact:
    """Quantize the denoiser of `model` and return the artifact; `model` itself is not changed.

    Blocks are taken in order: their inputs come from the already quantized prefix, their targets
    from the full-precision model. `work` names a folder in which finished blocks are kept; after
    Ctrl-C, Cancelled or a kill, the same call resumes there and ends in the same artifact.
    """
    denoiser = denoiser_of(model)
    backbone = describe(denoiser)
    rounding = effort(preset).rounding
    recipe = scheme if isinstance(scheme, Recipe) else recipe_for(scheme, backbone, rounding)
    job = Job(denoiser, backbone, recipe, trajectory, device, seed)
    if not job.plan:
        raise TenutoError("No layer of the model matches the recipe.")
    made = {"seed": seed, "device": job.device.type, "calibration": trajectory.about()}
    artifact = Artifact.new(model, trajectory.schedule(), made)
    inputs = {
        "job": "quantize",
        "recipe": recipe.to_json(),
        "seed": seed,
        "version": artifact.header,
    }
    with frozen(job.model):
        job.run(Work(work, inputs), on_progress)
    return job.fill(artifact, preset)


class Job:
    """One quantization: a private copy of the denoiser that is quantized as it goes."""

    def __init__(
        self,
        denoiser: nn.Module,
        backbone: Backbone,
        recipe: Recipe,
        trajectory: Trajectory,
        device: Any,
        seed: int,
    ) -> None:
        self.backbone, self.recipe, self.trajectory, self.seed = backbone, recipe, trajectory, seed
        self.device = (
            torch.device(device) if device is not None else next(denoiser.parameters()).device
        )
        self.model = copy.deepcopy(denoiser).float().to(self.device)
        found = (
            (name, recipe.rule(name)) for name, layer in layers(self.model) if _possible(layer)
        )
        self.plan: dict[str, Rule] = {name: rule for name, rule in found if rule is not None}
        self.weights: dict[str, QTensor] = {}
        self.errors: dict[str, float] = {}
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def units(self) -> Iterator[tuple[str, list[str]]]:
        """(unit, its layers): first what lies outside the blocks, then the blocks in order.

        A layer outside whose algorithm wants inputs is a unit of its own, where it runs.
        """
        place = {name: self.backbone.block_of(name) for name in self.plan}
        alone = {n for n, rule in self.plan.items() if place[n] is None and _needs(rule)}
        place |= {n: n if n in alone else place[n] or "outside" for n in self.plan}
        units = list(self.backbone.blocks)
        if alone:
            call = self.trajectory.calls[0]
            units = in_order(self.model, [*units, *sorted(alone)], call, self.device)
        for unit in ["outside", *units]:
            yield unit, [n for n in self.plan if place[n] == unit]

    def run(self, work: Work, on_progress: Progress | None) -> None:
        """Every unit, from `work` where it is finished."""
        units = [(unit, names) for unit, names in self.units() if names]
        needy = {unit for unit, names in units if any(_needs(self.plan[n]) for n in names)}
        blocks = [unit for unit, _ in units if unit != "outside"]
        calls = self.trajectory.calls
        chain = Chain(self.model, self.backbone.blocks, blocks, needy, calls, self.device)
        for place, (unit, names) in enumerate(units):
            note = _notes(on_progress, place, len(units), unit)
            note(0, 1, "")
            kept = work.load(unit)
            if kept is None:
                kept = self._quantized(unit, names, chain, note)
                work.save(unit, kept)
            self._take(names, kept)
            chain.passed(unit)
        if on_progress:
            on_progress(len(units) * UNIT, len(units) * UNIT, "activation ranges")
        self._find_ranges(work)

    def _quantized(
        self, unit: str, names: list[str], chain: Chain, note: Progress
    ) -> dict[str, Tensor]:
        """The tensors of one unit, grouped by algorithm."""
        root = self.model if unit == "outside" else self.model.get_submodule(unit)
        short = {n: n if unit == "outside" else n[len(unit) + 1 :] for n in names}
        groups: dict[Any, dict[str, Scheme]] = {}
        for name in names:
            rule = self.plan[name]
            assert rule.scheme is not None
            groups.setdefault(rule.algorithm or RoundToNearest(), {})[short[name]] = rule.scheme
        found: dict[str, Tensor] = {}
        for algorithm, group in groups.items():
            bank, target = (None, None)
            if algorithm.needs_inputs:
                bank, target = chain.data(unit)
            seed = _seed(self.seed, unit)
            done = algorithm(root, group, bank, target, seed=seed, on_progress=note)
            for name, q in done.items():
                full = name if unit == "outside" else f"{unit}.{name}".rstrip(".")
                found |= q.tensors(full)
        return found

    def _take(self, names: list[str], tensors: dict[str, Tensor]) -> None:
        """Put quantized weights into the copy, as their float values."""
        for name in names:
            rule, layer = self.plan[name], self.model.get_submodule(name)
            assert rule.scheme is not None and isinstance(layer, nn.Linear | nn.Conv2d)
            q = QTensor.from_tensors(tensors, name, layer.weight.shape, rule.scheme.weight.bits)
            value = q.dequantize().to(self.device)
            gap = (value - layer.weight).norm() / layer.weight.norm().clamp_min(1e-12)
            self.errors[name] = float(f"{float(gap):.4g}")
            self.weights[name] = q
            layer.weight.data.copy_(value)

    @torch.no_grad()
    def _find_ranges(self, work: Work) -> None:
        """Stored activation ranges: min-max over the recorded calls, per step where asked."""
        wanted = {
            n: r.scheme.activation for n, r in self.plan.items() if r.scheme and r.scheme.activation
        }
        wanted = {n: f for n, f in wanted.items() if f is not None and not f.dynamic}
        if not wanted:
            return
        kept = work.load("ranges")
        if kept is None:
            kept = self._observed(list(wanted))
            work.save("ranges", kept)
        for name, form in wanted.items():
            low, high = kept[f"{name}.low"], kept[f"{name}.high"]
            if not form.per_step:
                low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
            self.ranges[name] = affine(low, high, form.bits, form.symmetric)

    def _observed(self, names: list[str]) -> dict[str, Tensor]:
        steps, row = len(self.trajectory.timesteps), 0
        found = {f"{n}.low": torch.full((steps,), torch.inf) for n in names}
        found |= {f"{n}.high": torch.full((steps,), -torch.inf) for n in names}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                low, high = torch.aminmax(args[0].detach())
                lows, highs = found[f"{name}.low"], found[f"{name}.high"]
                lows[row] = min(float(lows[row]), float(low))
                highs[row] = max(float(highs[row]), float(high))

            return hook

        hooks = [self.model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
        try:
            for call in self.trajectory.calls:
                row = call.row
                self.model(**arguments(self.model, call, self.device))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def fill(self, artifact: Artifact, preset: str) -> Artifact:
        """`artifact` with the sections weights and ranges and what is known of them."""
        for name, q in self.weights.items():
            artifact.tensors |= {f"weights/{k}": v for k, v in q.tensors(name).items()}
        for name, (scale, zero) in self.ranges.items():
            artifact.tensors |= {f"ranges/{name}.scale": scale, f"ranges/{name}.zero_point": zero}
        used = {r.scheme.name: r.scheme for r in self.plan.values() if r.scheme is not None}
        artifact.header |= {
            "schemes": {name: scheme.to_json() for name, scheme in used.items()},
            "recipe": self.recipe.to_json(),
            "preset": preset,
            "layers": {
                name: {
                    "scheme": rule.scheme.name,
                    "shape": list(self.weights[name].shape),
                    "weight_error": self.errors[name],
                }
                for name, rule in self.plan.items()
                if rule.scheme is not None
            },
        }
        return artifact


def _needs(rule: Rule) -> bool:
    return bool(getattr(rule.algorithm, "needs_inputs", False))


def _possible(layer: nn.Module) -> bool:
    """Zero padding only: the kernels know no other."""
    return not isinstance(layer, nn.Conv2d) or (
        layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def _seed(seed: int, unit: str) -> int:
    """A seed of its own for every unit, the same in every run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{unit}".encode()).digest()[:6], "little")


def _notes(on_progress: Progress | None, place: int, count: int, unit: str) -> Progress:
    """Progress of a unit on one scale, `UNIT` a unit."""

    def note(done: int, total: int, text: str) -> None:
        if on_progress:
            part = UNIT * done // max(1, total)
            on_progress(place * UNIT + part, count * UNIT, f"{unit} {text}".strip())

    return note
