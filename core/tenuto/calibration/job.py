"""`Job`: one denoiser or text encoder, quantized block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..model import Backbone, device_and_dtype, layers
from ..numerics import QTensor, Recipe, Rule, Scheme
from ..progress import Progress, parts
from ..resume import Work
from ..runtime import quantizable
from ..sampling import HELD_OUT, Trajectory, processes
from .activation_ranges import activation_ranges
from .algorithms import goes_on
from .algorithms.nearest import RoundToNearest
from .algorithms.tiar import Tiar
from .bank import on_device
from .bank_files import BankFiles
from .by_block import Values, by_block, held
from .by_denoiser import seed_of
from .chain import Chain
from .check.peak import room_for_banks
from .codes import Codes
from .replay import in_order
from .temporal.maintenance import UNIT as TEMPORAL
from .temporal.maintenance import Maintenance, per_step

UNIT = 1000  # what one block is worth in the progress
Unit = tuple[str, list[str]]  # its name and its layers


class Job:
    """One quantization: a private copy of the denoiser that is quantized as it goes.

    compares: whether held-out rows are compared with outputs in full precision in any case.
    model: that copy, in which a block has its weights when it is called, see `by_block`. weights:
    the codes of the layers that are done, read from the work when they are asked for. max_memory:
    bytes that it is kept to; recorded inputs that would take more lie on disk, see `BankFiles`.
    seen: the calls that blocks and ranges see, where those are others than all of the trajectory.
    """

    compares = False
    max_memory: int | None = None

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
        self.seen, (usual, _) = trajectory, device_and_dtype(denoiser)
        self.device = usual if device is None else torch.device(device)
        self.weights, self.denoiser = Codes(), denoiser
        self.values = Values(denoiser, self.device, self.weights)
        self.model = self.plain_copy(self.weights)
        self.plan: dict[str, Rule] = {
            name: rule
            for name, layer in layers(self.model)
            if (rule := recipe.rule(name)) is not None and quantizable(layer, rule.scheme)
        }
        self.errors: dict[str, float] = {}
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self.maintained: dict[str, Tensor] = {}

    def plain_copy(self, codes: Codes | None = None) -> nn.Module:
        """The denoiser in fp32, with the codes that there are."""
        return by_block(self.denoiser, self.backbone.blocks, self.device, codes)

    def maintain(self, choice: str, rounding: Tiar, budget: float = 0.5) -> None:
        """Set what becomes of the time-only modules; before anything is quantized."""
        plan = {n: rule.scheme for n, rule in self.plan.items() if rule.scheme is not None}
        names, given = self.backbone.temporal, (self.trajectory, self.device)
        self.time = Maintenance.of(self.model, names, plan, *given, choice, rounding, budget)

    def units(self) -> Iterator[tuple[str, list[str]]]:
        """(unit, its layers): the time-only ones, then what lies outside the blocks, the blocks.

        A layer outside whose algorithm wants inputs is a unit of its own, where it runs.
        """
        place = {name: self.backbone.block_of(name) for name in self.plan}
        place |= dict.fromkeys(self.time.layers(), TEMPORAL)
        alone = {n for n, rule in self.plan.items() if place[n] is None and _needs(rule)}
        place |= {n: n if n in alone else place[n] or "outside" for n in self.plan}
        units = list(self.backbone.blocks)
        if alone:
            call = self.trajectory.calls[0]
            units = in_order(self.model, [*units, *sorted(alone)], call, self.device)
        for unit in [TEMPORAL, "outside", *units]:
            yield unit, [n for n in self.plan if place[n] == unit]

    def run(self, work: Work, on_progress: Progress | None, ranges: Progress | None = None) -> None:
        """Every unit, from `work` where it is finished. ranges: progress of the stored ranges."""
        units = [(unit, names) for unit, names in self.units() if names]
        needy = {unit for unit, names in units if any(_needs(self.plan[n]) for n in names)}
        blocks = [unit for unit, _ in units if unit not in (TEMPORAL, "outside")]
        calls, rules = self.seen.calls, self.plan.values()
        whole = any(_needs(r) and getattr(r.algorithm, "needs_target", True) for r in rules)
        wanted = [c for c in calls if whole or (self.compares and c.row == HELD_OUT)]
        plain = self.plain_copy if wanted else None
        given = self.denoiser, self.backbone, self.device, self.max_memory
        files, every = BankFiles(work.path, lambda: room_for_banks(*given)), self.backbone.blocks
        chain = Chain(self.model, every, blocks, needy, calls, self.device, plain, files, wanted)
        notes = parts(on_progress, {unit: UNIT for unit, _ in units}, named=True)
        for unit, names, kept in self._done(units, needy, chain, work, notes):
            self._take(self._settled(kept) if unit == TEMPORAL else names, kept, unit, work)
            del kept
            chain.passed(unit)
        if on_progress is not None:
            on_progress(1, 1, "layers rounded")
        self._find_ranges(work, ranges)
        if not self.time.layers():
            self.maintained = self.time.plain(self.weights, self.ranges)

    def _done(
        self,
        units: list[Unit],
        needy: set[str],
        chain: Chain,
        work: Work,
        notes: Mapping[str, Progress],
    ) -> Iterator[tuple[str, list[str], dict[str, Tensor]]]:
        """(unit, its layers, its tensors), each in `work` by then.

        What needs no data depends on no other unit: each process does one.
        """

        def made(unit: Unit) -> dict[str, Tensor]:
            notes[unit[0]](0, 1, "")
            return self._quantized(*unit, chain, notes[unit[0]])

        for some in _windows(units, needy, processes().size):
            kept = {unit: work.load(unit) for unit, _ in some}
            left = [(unit, names) for unit, names in some if kept[unit] is None]
            new = map(made, left) if some[0][0] in needy else processes().each(left, made)
            for unit, names in some:
                notes[unit](0, 1, "")
                yield unit, names, _saved(work, unit, kept.pop(unit), new)

    def _settled(self, kept: dict[str, Tensor]) -> list[str]:
        """Take over what became of the time-only modules; returns their layers that are left."""
        self.maintained = kept
        for name in self.time.layers():
            rule, scale = self.plan.pop(name), kept.get(f"ranges/{name}.scale")
            if f"{name}.qdata" in kept and rule.scheme is not None:
                self.plan[name] = replace(rule, scheme=per_step(rule.scheme))
            if scale is not None:
                self.ranges[name] = scale, kept[f"ranges/{name}.zero_point"]
        return [n for n in self.time.layers() if n in self.plan]

    def _quantized(
        self, unit: str, names: list[str], chain: Chain, note: Progress
    ) -> dict[str, Tensor]:
        """The tensors of one unit, grouped by algorithm."""
        if unit == TEMPORAL:
            return self.time.quantized(seed_of(self.seed, unit), note)
        root = self.model if unit == "outside" else self.model.get_submodule(unit)
        short = {n: n if unit == "outside" else n[len(unit) + 1 :] for n in names}
        groups: dict[Any, dict[str, Scheme]] = {}
        for name in names:
            rule = self.plan[name]
            assert rule.scheme is not None
            groups.setdefault(rule.algorithm or RoundToNearest(), {})[short[name]] = rule.scheme
        found: dict[str, Tensor] = {}
        for algorithm, group in groups.items():
            needs, seed = algorithm.needs_inputs, seed_of(self.seed, unit)
            data = on_device(*chain.data(unit), self.device) if needs else (None, None)
            with held(root):
                done = self._rounded(algorithm, root, group, data, seed, note)
            for name, q in done.items():
                full = name if unit == "outside" else f"{unit}.{name}".rstrip(".")
                found |= q.tensors(full)
        return found

    def _rounded(
        self,
        algorithm: Any,
        root: nn.Module,
        group: dict[str, Scheme],
        data: tuple[Any, Any],
        seed: int,
        note: Progress,
    ) -> dict[str, QTensor]:
        """The weights of a group of layers of one unit. data: its bank and target, or None."""
        more = {"before": self.known(root, group) or None} if goes_on(algorithm) else {}
        rounded = partial(algorithm, root, group, *data, seed=seed, on_progress=note, **more)
        if processes().size == 1 or getattr(algorithm, "together", False):
            return rounded()
        made = processes().once(lambda: {n: q.tensors(n) for n, q in rounded().items()})
        shapes: Any = {n: root.get_submodule(n).weight.shape for n in made}
        return {
            n: QTensor.from_tensors(tensors, n, shapes[n], group[n].weight)
            for n, tensors in made.items()
        }

    def known(self, root: nn.Module, group: Mapping[str, Scheme]) -> dict[str, QTensor]:
        """What is known of layers inside of `root` rounded to nearest: all of `group`, or none."""
        return {}

    def _take(self, names: list[str], tensors: dict[str, Tensor], unit: str, work: Work) -> None:
        """Take over quantized weights: what lies in no block gets their float values now."""
        for name in names:
            rule, layer = self.plan[name], self.model.get_submodule(name)
            assert rule.scheme is not None and isinstance(layer, nn.Linear | nn.Conv2d)
            form = rule.scheme.weight
            q = QTensor.from_tensors(tensors, name, layer.weight.shape, form)
            value, was = q.to(self.device).dequantize(), self.values.of(f"{name}.weight")
            gap = (value - was).norm() / was.norm().clamp_min(1e-12)
            self.errors[name] = float(f"{float(gap):.4g}")
            self.weights.add(name, work, unit, q.shape, form)
            if not layer.weight.is_meta:
                layer.weight.data.copy_(value)

    def _find_ranges(self, work: Work, on_progress: Progress | None = None) -> None:
        """Stored activation ranges, of the layers that have none yet."""
        schemes = {n: r.scheme for n, r in self.plan.items() if r.scheme and n not in self.ranges}
        forms = {n: s.activation for n, s in schemes.items() if s.activation and s.stored}
        given = self.model, forms, self.seen, self.device, work
        self.ranges |= activation_ranges(*given, on_progress)
        for name in forms.keys() - self.ranges.keys():  # never called: they stay as they are
            self.weights.drop(name)
            self.plan.pop(name)

    def described(self) -> dict[str, Any]:
        """What a header says of the quantized layers: schemes, recipe, layers."""
        used = {r.scheme.name: r.scheme for r in self.plan.values() if r.scheme is not None}
        return {
            "schemes": {name: scheme.to_json() for name, scheme in used.items()},
            "recipe": self.recipe.to_json(),
            "layers": {
                name: {
                    "scheme": rule.scheme.name,
                    "shape": list(self.weights.shape(name)),
                    "weight_error": self.errors[name],
                }
                for name, rule in self.plan.items()
                if rule.scheme is not None
            },
        }

    def fill(self, artifact: Artifact, preset: str) -> Artifact:
        """`artifact` with the sections weights and ranges and what is known of them."""
        for name, q in self.weights.items():
            artifact.tensors |= {f"weights/{k}": v for k, v in q.tensors(name).items()}
        for name, (scale, zero) in self.ranges.items():
            artifact.tensors |= {f"ranges/{name}.scale": scale, f"ranges/{name}.zero_point": zero}
        for key, value in self.maintained.items():
            if key.startswith("table/"):
                artifact.tensors[f"{TEMPORAL}/{key.removeprefix('table/')}"] = value
        artifact.header |= self.described() | {
            "preset": preset,
            TEMPORAL: self.time.header(self.maintained),
        }
        return artifact


def _saved(
    work: Work,
    unit: str,
    tensors: dict[str, Tensor] | None,
    new: Iterator[dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The tensors of a unit; where there are none yet the next of `new`, once they are in `work`.

    It is all that has them: they are large.
    """
    if tensors is None:
        tensors = next(new)
        work.save(unit, tensors)
    return tensors


def _windows(units: Iterable[Unit], needy: set[str], size: int) -> Iterator[list[Unit]]:
    """`units` in order: of those that need no data as many as `size` in a row, others alone."""
    some: list[Unit] = []
    for unit in units:
        if some and (len(some) == size or unit[0] in needy):
            yield some
            some = []
        some.append(unit)
        if unit[0] in needy:
            yield some
            some = []
    if some:
        yield some


def _needs(rule: Rule) -> bool:
    return bool(getattr(rule.algorithm, "needs_inputs", False))
