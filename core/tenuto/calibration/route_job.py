"""`RouteJob`: one search for what can be reused, of one denoiser."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..caching import (
    CacheSchedule,
    Facts,
    LearningToCache,
    RouterScores,
    StepProgramme,
    candidates,
    reuse_for,
    saved,
    table_policy,
    whole_steps,
)
from ..errors import ModelError, TenutoError
from ..model import (
    WHOLE,
    check_weights,
    describe,
    device_and_dtype,
    multiply_adds,
    parts_of,
    refuse_cache,
)
from ..progress import Progress, parts
from ..resume import Work
from ..sampling import Trajectory, to_device
from .router.effort import PRESETS, calls_of_search
from .router.iepo import gain
from .router.learning_to_cache import train_gates
from .router.logits import Router
from .router.rollout import errors, references, step_costs

HELD_OUT = 5_000  # first seed of the images that candidates are measured on
DEFAULT_REUSE = 0.3
SPREADS = (1.0, 0.25, 0.01)  # of the router's cells within a step: all are measured
TRAINED = (RouterScores.name, LearningToCache.name)
Notes = dict[str, Progress]  # of the parts of a search


class RouteJob:
    """One search for a route, of one denoiser; part: as `parts_of` names it."""

    def __init__(
        self,
        model: Any,
        trajectory: Trajectory,
        artifact: Artifact | None,
        preset: str,
        seed: int,
        part: str = "",
    ) -> None:
        self.part, self.denoiser = part, parts_of(model)[part]
        check_weights(self.denoiser)
        refuse_cache(self.denoiser, "a search for what can be reused")
        if artifact is not None:
            artifact.check(self.denoiser)
            _check_schedule(artifact, trajectory)
        self.model, self.artifact, self.seed, self.preset = model, artifact, seed, preset
        self.plan, self.trajectory, self.times = PRESETS[preset], trajectory, trajectory.timesteps
        self.only: str | None = None  # the policy asked for by name
        self.plain, self.recorded = self.denoiser, trajectory  # in full precision
        found = describe(self.denoiser).branches
        self.branches = tuple(b.name for b in found)
        self.whole_outputs = [b.name for b in found if b.whole]
        if not self.branches:
            raise ModelError(f"{type(self.denoiser).__name__} has no branch that can be reused.")
        if len(self.times) < 2:
            raise TenutoError("With one step there is nothing to reuse.")
        call = to_device(trajectory.calls[0].inputs, device_and_dtype(self.denoiser)[0])
        self.counts = multiply_adds(self.denoiser, (), call, names=self.branches)
        work = [float(self.counts[name]) for name in self.branches]
        self.costs = work if all(work) else None  # of the branches; None: all alike

    def plan_for(self, iterations: int | None) -> None:
        """What the caller has set otherwise than the preset."""
        if iterations is not None:
            router = dataclasses.replace(self.plan.router, iterations=iterations)
            self.plan = dataclasses.replace(self.plan, router=router)

    def choose(self, policy: str | None, weighting: str | None) -> None:
        """One policy alone, by name, and the rule of lambda, where the caller asks for them."""
        if weighting is not None:
            error = self.plan.router.error if weighting == "gain" else "additive"  # as published
            router = dataclasses.replace(self.plan.router, weighting=weighting, error=error)
            self.plan = dataclasses.replace(self.plan, router=router)
        if policy is None:
            return
        self.only = policy
        cls: Any = table_policy(policy)
        if hasattr(cls, "branches_of") and not self.whole:
            self._take(cls().branches_of(self.denoiser))

    def _take(self, names: tuple[str, ...]) -> None:
        call = to_device(self.trajectory.calls[0].inputs, device_and_dtype(self.denoiser)[0])
        self.branches, self.whole_outputs = names, list(names)
        self.counts = multiply_adds(self.denoiser, (), call, names=names)
        self.costs = None

    def use(self, denoiser: nn.Module | None, trajectory: Trajectory) -> None:
        """Search on the quantized `denoiser`; the others of `trajectory` are quantized too."""
        self.denoiser, self.trajectory = denoiser or self.denoiser, trajectory

    def take_whole(self) -> None:
        """Whole calls are what is reused, not the branches."""
        self.branches, self.counts = (WHOLE.name,), {WHOLE.name: self.counts[""]}
        self.costs, self.whole_outputs = [1.0], [WHOLE.name]

    def budget(self, reuse: float | None, speedup: float | None) -> None:
        """The share to reuse: of the work of all branches, which a speedup tells too.

        Cells are not equal: one share of them is a third less work in one table than in another.
        """
        steps = len(self.times)
        self.asked = {"reuse": reuse, "speedup": speedup}
        self.reuse = DEFAULT_REUSE if reuse is None else reuse
        if speedup is not None:
            self.reuse = reuse_for(speedup, self.counts, steps)
        if not 0 < self.reuse <= 1 - 1 / steps:
            raise TenutoError(f"{steps} steps cannot reuse {self.reuse:.0%} of their branches.")

    def run(self, path: str | Path | None, on_progress: Progress | None) -> Artifact:
        """Costs, router, measurements: from `path` as far as they are finished."""
        trajectory = self.trajectory
        result = Artifact.new(self.model, trajectory.schedule(), part=self.part)
        work = Work(path, {"job": "route", "about": self.about(), "model": result.header})
        notes = parts(on_progress, self.sizes())
        costs = self.measure_costs(work, notes)
        router = self.train(costs, work, notes) if self.trains else None
        cuts = {f"router spread {s:g}": router.cut(self.reuse, s) for s in SPREADS if router}
        tables = cuts | self.candidates(costs[0], work, notes)
        if not tables:
            raise TenutoError(f"{self.only} has no schedule that reuses {self.reuse:.0%}.")
        scores = self.measure(tables, work, notes)
        best = min(scores, key=lambda name: scores[name])
        result.tensors = {"route/table": tables[best].table, "route/costs": costs[0]}
        if router is not None:
            mine = min(cuts, key=lambda name: scores[name])
            result.tensors["route/router"] = tables[mine].table.clone()
            result.tensors["route/logits"] = router.logits
        result.header["route"] = self.facts(best, tables[best], scores, router)
        return result.add_forecast(trajectory.kernel)

    @property
    def whole(self) -> bool:
        """Whether whole calls are reused: the policies alone choose the steps, nothing is trained.

        A call has no gradient to weigh against another branch's.
        """
        return self.branches == (WHOLE.name,)

    @property
    def trains(self) -> bool:
        """Whether a router is trained."""
        return not self.whole and self.only in (None, RouterScores.name)

    def about(self) -> dict[str, Any]:
        """What decides the result, for the manifest of the work."""
        return {
            "plan": dataclasses.asdict(self.plan),
            "reuse": self.reuse,
            "costs": self.costs,
            "only": self.only,
            "seed": self.seed,
            "trajectory": self.trajectory.about(),
            "branches": list(self.branches),
            "artifact": self.artifact and self.artifact.header,
        }

    def candidates(
        self, costs: Tensor, work: Work | None = None, notes: Notes | None = None
    ) -> dict[str, CacheSchedule]:
        """Every policy's at this share, or those of the one asked. costs: (T,), of a step.

        work, notes: where gates are trained, for the policy that has some.
        """
        if self.only == RouterScores.name:
            return {}
        facts, gates = Facts(self.times, self.branches, tuple(costs.tolist())), None
        if self.only == LearningToCache.name:
            gates = torch.zeros(len(self.times), len(self.branches))
            if notes is not None:
                gates = train_gates(
                    self.denoiser, self.trajectory, self.branches, self.reuse, self.preset,
                    self.seed, work, notes["router"],
                )  # fmt: skip
        return candidates(self.reuse, dataclasses.replace(facts, logits=gates), self.only)

    def sizes(self) -> dict[str, int]:
        """What each part takes, in tenths of a denoiser call of one batch."""
        count = len(SPREADS) * self.trains
        count += len(self.candidates(Tensor([1.0] * len(self.times))))
        trained = self.trains or self.only in TRAINED
        calls = calls_of_search(self.plan, len(self.times), self.reuse, count, not trained)
        return {name: round(10 * count) for name, count in calls.items()}

    def measure_costs(self, work: Work, notes: Notes) -> tuple[Tensor, Tensor]:
        """`step_costs` in full precision, from `work` if they are there.

        The rounding of a quantized model is a floor, under which late steps all seem alike.
        """
        kept = work.load("costs")
        if kept is None:
            note, seed = notes["costs"], self.recorded.seed + self.seed
            result, step = step_costs(
                self.plain, self.recorded, self.branches, seed, self.plan.batch, note
            )
            kept = {"result": result, "step": step}
            work.save("costs", kept)
        return kept["result"], kept["step"]

    def train(self, costs: tuple[Tensor, Tensor], work: Work, notes: Notes) -> Router:
        """The router, from the step programme on, which it has to beat."""
        settings = dataclasses.replace(self.plan.router, reuse=self.reuse, seed=self.seed)
        programme = StepProgramme(
            whole_steps(self.reuse, len(self.times)), tuple(costs[0].tolist())
        )
        return settings(
            self.denoiser,
            self.trajectory,
            self.branches,
            costs=self.costs,
            gains=gain(*costs),
            start=programme(self.times, self.branches),
            work=work,
            on_progress=notes["router"],
        )

    def measure(
        self, tables: dict[str, CacheSchedule], work: Work, notes: Notes
    ) -> dict[str, float]:
        """Each candidate's squared error of the final latent: the geometric mean over images."""
        batch, note = self.plan.batch, notes["reference"]
        seeds = [HELD_OUT + self.seed + i * batch for i in range(self.plan.batches)]
        note(0, 1, "un-cached images")
        kept = work.load("reference")
        if kept is None:
            kept = {"reference": references(self.denoiser, self.trajectory, seeds, batch)}
            work.save("reference", kept)
        reference, scores, note = kept["reference"], {}, notes["candidates"]
        for i, (name, table) in enumerate(tables.items()):
            note(i, len(tables), f"measuring: {name}")
            kept = work.load(f"candidate {name}")
            if kept is None:
                found = errors(self.denoiser, table, self.trajectory, seeds, batch, reference)
                kept = {"errors": found.double()}
                work.save(f"candidate {name}", kept)
            scores[name] = float(kept["errors"].clamp_min(1e-30).log().mean().exp())
        note(1, 1, "measured")
        return scores

    def facts(
        self, best: str, table: CacheSchedule, scores: dict[str, float], router: Router | None
    ) -> dict[str, Any]:
        """The header of the route."""
        trained: dict[str, Any] = {}
        if router is not None:
            trained["router"] = dataclasses.asdict(self.plan.router) | {
                "reuse": self.reuse, "beta": float(f"{router.beta:.6g}"), "seed": self.seed,
            }  # fmt: skip
        return trained | {
            "policy": best,
            "timesteps": list(self.times),
            "branches": list(self.branches),
            "whole_outputs": self.whole_outputs,
            "order": table.order,
            "reuse_ratio": table.reuse_ratio,
            "reuse_flops": saved(table, self.counts),
            "scores": {name: float(f"{score:.6g}") for name, score in scores.items()},
            "asked": self.asked,
            "preset": self.preset,
            "device": device_and_dtype(self.denoiser)[0].type,
            "calibration": self.trajectory.about(),
        }


def _check_schedule(artifact: Artifact, trajectory: Trajectory) -> None:
    """Ranges of activations are bound to their own steps, and so is a route."""
    times = artifact.header["schedule"]["timesteps"]
    if artifact.section("ranges") and list(times) != list(trajectory.timesteps):
        raise TenutoError(
            f"The artifact has activation ranges for its own {len(times)} steps: record the "
            "trajectory with the same steps and guidance."
        )
