"""`train_router`: find, for one model, which branch to reuse at which step, and measure it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artifact import Artifact
from .attachment import quantized
from .caching.iepo import gain
from .caching.interval import late_interval_for
from .caching.programme import StepProgramme
from .caching.rollout import errors, references, step_costs
from .caching.router import HarmoniCa, Router
from .caching.schedule import CacheSchedule
from .cost import multiply_adds
from .errors import ModelError, SchemeError, TenutoError
from .families import describe
from .patching import denoiser_of, place
from .trajectory import Progress, Sample, Trajectory, to_device
from .work import Work

POWERS = (2.0, 3.0)  # of age, in the step programme: both are measured
HELD_OUT = 5_000  # first seed of the pictures that candidates are measured on
DEFAULT_REUSE = 0.3
PASSES = 3.5  # what a training step costs, in denoiser calls: teacher, student, gradient


@dataclass(frozen=True)
class RoutePreset:
    """Effort. router: settings of the training; seeds: batches that each candidate is measured on."""

    router: HarmoniCa
    seeds: int

    @property
    def batch(self) -> int:
        """Pictures a batch, everywhere."""
        return self.router.batch


PRESETS = {
    "quick": RoutePreset(HarmoniCa(iterations=16, batch=2), 2),
    "standard": RoutePreset(HarmoniCa(iterations=32, batch=4), 4),
    "thorough": RoutePreset(HarmoniCa(iterations=100, batch=8, lr=0.25), 8),
}


def train_router(
    model: Any,
    trajectory: Trajectory,
    *,
    reuse: float | None = None,
    speedup: float | None = None,
    artifact: Artifact | None = None,
    preset: str = "quick",
    iterations: int | None = None,
    seed: int = 0,
    sample: Sample | None = None,
    work: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Artifact:
    """Train a router for the denoiser of `model` and return an artifact with the section "route".

    reuse: the share of (step, branch) cells to hold; speedup: how many times fewer multiply-adds
    the denoiser is to do, of which a share follows (`reuse_for`). One of them; neither is 30 %.
    artifact: what was quantized before: its model is then both teacher and student.
    The router, the late intervals and the step programme at that reuse are all measured on
    held-out seeds against the un-cached run; the best becomes the route, and every score is told.
    `work` keeps what is finished: the same call resumes there and ends in the same artifact.
    """
    job = RouteJob(model, trajectory, reuse, speedup, artifact, preset, iterations, seed, sample)
    return job.run(work, on_progress)


class RouteJob:
    """One search for a route."""

    def __init__(
        self,
        model: Any,
        trajectory: Trajectory,
        reuse: float | None,
        speedup: float | None,
        artifact: Artifact | None,
        preset: str,
        iterations: int | None,
        seed: int,
        sample: Sample | None,
    ) -> None:
        if preset not in PRESETS:
            raise SchemeError(f"Unknown preset {preset!r}: choose one of {', '.join(PRESETS)}.")
        if reuse is not None and speedup is not None:
            raise TenutoError("Ask for a reuse ratio or for a speedup, not for both.")
        self.model, self.artifact, self.seed, self.effort = model, artifact, seed, preset
        self.plan = PRESETS[preset]
        if iterations is not None:
            router = dataclasses.replace(self.plan.router, iterations=iterations)
            self.plan = dataclasses.replace(self.plan, router=router)
        if sample is not None:
            trajectory = dataclasses.replace(trajectory, sample=sample, latent=None)
        self.trajectory, self.times = trajectory, trajectory.timesteps
        self.branches = tuple(b.name for b in describe(denoiser_of(model)).branches)
        if not self.branches:
            raise ModelError(f"{type(denoiser_of(model)).__name__} has no branch that can be held.")
        _check_schedule(artifact, trajectory)
        self.denoiser = denoiser_of(model)
        self.counts = self._counted()
        self.asked = {"reuse": reuse, "speedup": speedup}
        self.costs = None if speedup is None else [self.counts[n] for n in self.branches]
        steps = len(self.times)
        if speedup is not None:
            reuse = reuse_for(speedup, self.counts, steps)
        self.reuse = DEFAULT_REUSE if reuse is None else reuse
        if not 0 < self.reuse <= 1 - 1 / steps:
            raise TenutoError(f"{steps} steps cannot reuse {self.reuse:.0%} of their branches.")

    def _counted(self) -> dict[str, int]:
        """Multiply-adds of one call: "" the whole, and each branch."""
        device, _ = place(self.denoiser)
        call = to_device(self.trajectory.calls[0].inputs, device)
        return multiply_adds(self.denoiser, (), call, names=self.branches)

    def run(self, path: str | Path | None, on_progress: Progress | None) -> Artifact:
        """Costs, candidates, router, measurements: from `path` as far as they are finished."""
        result = Artifact.new(
            self.model,
            {
                "timesteps": list(self.times),
                "steps": self.trajectory.steps,
                "guidance": self.trajectory.guidance,
            },
        )
        work = Work(path, {"job": "route", "settings": self._about(), "model": result.header})
        if self.artifact is not None:
            self.denoiser = quantized(self.model, self.artifact, route=False).denoiser
        meter = Meter(on_progress, self._parts())
        result_costs, step = self._costs(work, meter)
        router = self._router(gain(result_costs, step), work, meter)
        tables = self._fixed(result_costs) | {"router": router.cut(self.reuse)}
        scores = self._measured(tables, work, meter)
        return self._filled(result, router, tables, scores)

    def _about(self) -> dict[str, Any]:
        quantization = self.artifact and self.artifact.header
        return {
            "plan": dataclasses.asdict(self.plan),
            "asked": self.asked,
            "seed": self.seed,
            "trajectory": self.trajectory.about(),
            "artifact": quantization,
        }

    def _late(self) -> dict[str, CacheSchedule]:
        found = late_interval_for(self.reuse, self.times, self.branches)
        return {f"late interval {p.first}/{p.period}": p(self.times, self.branches) for p in found}

    def _fixed(self, costs: Tensor) -> dict[str, CacheSchedule]:
        """The candidates that need no training."""
        prices = tuple(costs.tolist())
        programmes = {
            f"step programme, age^{p:g}": StepProgramme(self.reuse, prices, p) for p in POWERS
        }
        return self._late() | {n: p(self.times, self.branches) for n, p in programmes.items()}

    def _parts(self) -> dict[str, float]:
        """What each part costs, in denoiser calls of one batch."""
        steps = len(self.times)
        candidates = len(self._late()) + len(POWERS) + 1
        return {
            "costs": steps * (steps + 3) / 2,
            "router": self.plan.router.iterations * steps * PASSES,
            "reference": self.plan.seeds * steps,
            "candidates": candidates * self.plan.seeds * steps * (1 - self.reuse),
        }

    def _costs(self, work: Work, meter: Meter) -> tuple[Tensor, Tensor]:
        kept = work.load("costs")
        if kept is None:
            note, seed = meter.part("costs"), self.trajectory.seed + self.seed
            found = step_costs(
                self.denoiser, self.trajectory, self.branches, seed, self.plan.batch, note
            )
            kept = dict(zip(("result", "step"), found, strict=True))
            work.save("costs", kept)
        return kept["result"], kept["step"]

    def _router(self, gains: Tensor, work: Work, meter: Meter) -> Router:
        settings = dataclasses.replace(self.plan.router, reuse=self.reuse, seed=self.seed)
        return settings(
            self.denoiser,
            self.trajectory,
            self.branches,
            costs=self.costs,
            gains=gains,
            work=work,
            on_progress=meter.part("router"),
        )

    def _measured(
        self, tables: dict[str, CacheSchedule], work: Work, meter: Meter
    ) -> dict[str, float]:
        """Each candidate's squared error of the final latent, the geometric mean over pictures."""
        batch, note = self.plan.batch, meter.part("reference")
        seeds = [HELD_OUT + self.seed + i * batch for i in range(self.plan.seeds)]
        note(0, 1, "un-cached pictures")
        kept = work.load("reference")
        if kept is None:
            kept = {"reference": references(self.denoiser, self.trajectory, seeds, batch)}
            work.save("reference", kept)
        reference, scores = kept["reference"], {}
        note = meter.part("candidates")
        for i, (name, table) in enumerate(tables.items()):
            note(i, len(tables), f"measuring: {name}")
            kept = work.load(f"candidate/{name}")
            if kept is None:
                found = errors(self.denoiser, table, self.trajectory, seeds, batch, reference)
                kept = {"errors": found.double()}
                work.save(f"candidate/{name}", kept)
            scores[name] = float(kept["errors"].clamp_min(1e-30).log().mean().exp())
        note(1, 1, "done")
        return scores

    def _filled(
        self,
        result: Artifact,
        router: Router,
        tables: dict[str, CacheSchedule],
        scores: dict[str, float],
    ) -> Artifact:
        best = min(scores, key=lambda name: scores[name])
        table = tables[best]
        result.tensors = {
            "route/table": table.table,
            "route/router": tables["router"].table,
            "route/logits": router.logits,
        }
        result.header["route"] = {
            "policy": best,
            "timesteps": list(self.times),
            "branches": list(self.branches),
            "reuse_ratio": table.reuse_ratio,
            "reuse_flops": self.saved(table),
            "scores": {name: float(f"{score:.6g}") for name, score in scores.items()},
            "asked": self.asked,
            "preset": self.effort,
            "beta": float(f"{router.beta:.6g}"),
            "made": {
                "seed": self.seed,
                "device": place(self.denoiser)[0].type,
                "calibration": self.trajectory.about(),
            },
        }
        return result

    def saved(self, table: CacheSchedule) -> float:
        """The share of a run's multiply-adds that `table` holds."""
        counts = torch.tensor([float(self.counts[name]) for name in self.branches])
        held = float(((~table.table).float() @ counts).sum())
        return held / (self.counts[""] * len(self.times))


class Meter:
    """Progress of several parts on one scale: denoiser calls of one batch, in tenths."""

    def __init__(self, on_progress: Progress | None, parts: dict[str, float]) -> None:
        self.on_progress = on_progress
        self.parts = {name: round(10 * cost) for name, cost in parts.items()}

    def part(self, name: str) -> Callable[[int, int, str], None]:
        """The progress of one part, 0 to its own total."""
        names = list(self.parts)
        before = sum(self.parts[n] for n in names[: names.index(name)])

        def note(done: int, total: int, text: str) -> None:
            if self.on_progress:
                mine = self.parts[name] * done // max(1, total)
                self.on_progress(before + mine, sum(self.parts.values()), text)

        return note


def reuse_for(speedup: float, counts: dict[str, int], steps: int) -> float:
    """The share of branch work to hold so that a run has `speedup` times fewer multiply-adds.

    counts: of one call, "" the whole and each branch (`cost.multiply_adds`). What lies outside the
    branches is always computed, and so is the first step.
    """
    share = sum(n for name, n in counts.items() if name) / counts[""]
    most = 1 / (1 - share * (1 - 1 / steps))
    if not 1 < speedup <= most:
        raise TenutoError(
            f"{steps} steps of this model can be from 1 to {most:.2f} times faster, not {speedup:g}."
        )
    return (1 - 1 / speedup) / share


def _check_schedule(artifact: Artifact | None, trajectory: Trajectory) -> None:
    if artifact is None:
        return
    times = artifact.header["schedule"]["timesteps"]
    if artifact.section("ranges") and list(times) != list(trajectory.timesteps):
        raise TenutoError(
            f"The artifact has activation ranges for its own {len(times)} steps: "
            "record the trajectory with the same steps."
        )
