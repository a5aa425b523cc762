"""What `schedules.py` compares: every policy, and for each the settings that it is chosen from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tenuto as tn
from tenuto.caching import (
    L2P,
    CacheSchedule,
    DeepCache,
    EasyCache,
    Facts,
    FirstBlock,
    GrowingWindow,
    LearningToCache,
    MagCache,
    Magnitudes,
    RandomTable,
    TaylorSeer,
    interval_for,
    late_interval_for,
    whole_steps,
)
from tenuto.calibration import train_router
from tenuto.calibration.router.learning_to_cache import train_gates
from tenuto.model import denoiser_of

SOLVERS = {
    "DPM-Solver++ 2M": "DPMSolverMultistepScheduler", "UniPC": "UniPCMultistepScheduler",
}  # fmt: skip
THRESHOLDS = tuple(0.01 * 1.35**i for i in range(18))  # 1 % to 164 %
RIDGES = (3e-4, 1e-3, 3e-3, 1e-2)
NAMES = (
    "forecast", "late interval", "interval", "growing window", "random", "taylorseer 1",
    "taylorseer 2", "deepcache", "learning-to-cache", "l2p", "first block", "magcache",
    "easycache", "router", "search", "search, forecast in branches", "fewer steps",
    *SOLVERS,
)  # fmt: skip

LONG = 80  # letters of a setting
TRAINED = ("learning-to-cache", "router")  # "search" is of the router's training, too

Way = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Setting:
    """One setting of a policy. way: what is on while it generates. calls: as many steps are run.

    share: of the steps in which something is skipped, by construction; None: it decides at run
    time, and the scan counts.
    """

    label: str
    way: Way
    calls: int
    share: float | None


class Policies:
    """The settings of every policy for one model."""

    def __init__(self, pipe: Any, trajectory: Any, preset: str, work: Any = None) -> None:
        self.pipe, self.trajectory, self.preset, self.work = pipe, trajectory, preset, work
        self.steps = len(trajectory.timesteps)
        self.trained: dict[str, dict[str, Tensor]] = {}
        self.artifact = tn.Artifact.new(pipe, trajectory.schedule())
        self.artifact.add_forecast(trajectory.kernel)
        self.bare = tn.Artifact({k: v for k, v in self.artifact.header.items() if k != "forecast"})
        self.denoiser = denoiser_of(pipe)
        branches = tuple(b.name for b in tn.describe(self.denoiser).branches)
        self.facts = Facts(trajectory.timesteps, branches)

    @property
    def unet(self) -> bool:
        """Whether the model is one."""
        return hasattr(self.denoiser, "down_blocks")

    def put(self, policy: Any) -> Way:
        """The model under a policy."""
        return lambda: tn.attach(self.pipe, self.bare, policy=policy, graphs=False)

    def settings(self, name: str, share: float) -> Iterator[Setting]:
        """Those of the policy `name` for a share of the steps; of run-time policies: all."""
        calls = self.steps - round(share * self.steps)
        if name == "forecast":
            speedup = self.steps / calls
            how = {"speedup": speedup, "graphs": False}
            way = lambda: tn.attach(self.pipe, self.artifact, **how)  # noqa: E731
            yield Setting(f"{calls} calls", way, self.steps, share)
        elif name == "fewer steps":
            yield Setting(f"{calls} steps", self.put(None), calls, share)
        elif name in SOLVERS:
            yield Setting(f"{calls} steps", lambda: self.solved_by(SOLVERS[name]), calls, share)
        elif name in ("first block", "magcache", "easycache"):
            for policy in getattr(self, name.replace(" ", "_"))():
                label = str(policy) if name != "magcache" else _magcache(policy)
                yield Setting(label, self.put(policy), self.steps, None)
        else:
            for policy in self.tables(name, share):
                label = getattr(policy, "label", str(policy))
                if len(label) > LONG:  # of a table itself, which is the one of its share
                    label = f"for {share:.0%}"
                ridge = f", ridge {policy.ridge:g}" if name == "l2p" else ""
                yield Setting(label + ridge, self.put(policy), self.steps, share)

    def tables(self, name: str, share: float) -> list[Any]:
        """Policies that skip about that share by a table."""
        facts, whole = self.facts, whole_steps(share, self.steps)
        grid = facts.timesteps, facts.branches
        if name == "late interval":
            return late_interval_for(whole, *grid)
        if name == "interval":
            return interval_for(whole, *grid)
        if name == "growing window":
            return GrowingWindow.for_share(share, facts)
        if name == "random":
            return [RandomTable(share, seed) for seed in range(4)]
        if name.startswith("taylorseer"):
            return TaylorSeer.for_share(share, facts, (int(name[-1]),))
        if name == "deepcache":
            return DeepCache.for_share(share, facts) if self.unet else []
        if name == "learning-to-cache":
            trains = self.trains(name, share)
            return [LearningToCache(self.gates(share), reuse=share)] if trains else []
        if name == "l2p":
            kernel = self.trajectory.kernel
            return [p for ridge in RIDGES for p in L2P.at_share(share, facts, kernel, ridge)]
        return self.searched(name, share)

    def trains(self, name: str, share: float) -> bool:
        """Whether a trained policy can have this share."""
        return name != "learning-to-cache" or share <= self.steps // 2 / self.steps

    def gates(self, share: float) -> Tensor:
        """Of Learning-to-Cache, trained for that share."""

        def made() -> dict[str, Tensor]:
            branches = self.facts.branches
            gates = train_gates(self.denoiser, self.trajectory, branches, share, self.preset)
            return {"gates": gates}

        return self.kept(f"gates-{share:g}", made)["gates"]

    def searched(self, name: str, share: float) -> list[Any]:
        """Of a search by `train_router`: the router's own table, or the best of all it measured."""

        def made() -> dict[str, Tensor]:
            route = train_router(self.pipe, self.trajectory, reuse=share, preset=self.preset)
            return {n: route.tensors[f"route/{n}"].bool() for n in ("router", "table")}

        found = self.kept(f"route-{share:g}", made)["router" if name == "router" else "table"]
        table = CacheSchedule(found.bool(), self.facts.timesteps, self.facts.branches)
        order = 1 if name.endswith("in branches") else 0
        return [replace(table, order=order)]

    def kept(self, name: str, made: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was trained: made once, and read from the work folder afterwards."""
        file = self.work and self.work / f"{name}.safetensors"
        if name not in self.trained:
            if file and file.exists():
                self.trained[name] = load_file(file)
            else:
                found = {n: t.detach().cpu().contiguous() for n, t in made().items()}
                self.trained[name] = found
                if file:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    part = file.with_suffix(".part")
                    save_file(found, part)
                    part.replace(file)
        return self.trained[name]

    def first_block(self) -> list[FirstBlock]:
        """Thresholds, and how many first steps compute."""
        kinds = (False, True) if self.unet else (False,)
        return [FirstBlock(t, first, r) for r in kinds for first in (1, 4) for t in THRESHOLDS]

    def magcache(self) -> list[MagCache]:
        """Thresholds and lengths, by the ratios of the recorded images; one for each table."""
        found: dict[tuple[Any, ...], MagCache] = {}
        for residual in (False, True) if self.unet else (False,):
            for longest in (2, 4, 8):
                for retained in (0.1, 0.2, 0.3):
                    for t in THRESHOLDS:
                        made = MagCache(self.ratios(residual), t, longest, retained, residual)
                        found.setdefault((residual, *self.decided(made)), made)
        return list(found.values())

    def decided(self, policy: MagCache) -> list[bool]:
        """Which steps it skips: it looks at no input."""
        gate, nothing = policy.gate(), torch.zeros(1)
        return [gate.skips(nothing, step, self.steps) for step in range(1, self.steps)]

    def ratios(self, residual: bool) -> tuple[float, ...]:
        """Of magnitudes, in one recording."""
        if residual not in self._ratios:
            meter = Magnitudes({}, residual)
            with self.put(meter)():
                self.trajectory.rollout()(self.denoiser, self.trajectory.seed, 8)
            self._ratios[residual] = meter.ratios()
        return self._ratios[residual]

    @cached_property
    def _ratios(self) -> dict[bool, tuple[float, ...]]:
        return {}

    def easycache(self) -> list[EasyCache]:
        """Thresholds and first steps; the output less the sample, or the output itself."""
        return [
            EasyCache(t, first, residual=r)
            for r in (True, False)
            for first in (2, 4, 6)
            for t in THRESHOLDS
        ]

    @contextmanager
    def solved_by(self, name: str) -> Iterator[None]:
        """The pipeline with another solver of the same equation."""
        import diffusers

        before = self.pipe.scheduler
        self.pipe.scheduler = getattr(diffusers, name).from_config(before.config)
        try:
            yield
        finally:
            self.pipe.scheduler = before


def _magcache(policy: MagCache) -> str:
    kept = ", less the sample" if policy.residual else ""
    return f"{policy.threshold:.3f}, {policy.longest} in a row, {policy.retained:g} kept{kept}"


def skipped(denoiser_counts: dict[str, list[int]]) -> float:
    """The share of calls, or of cells, that was skipped, by the counts of an attachment."""
    computed = sum(c[0] for c in denoiser_counts.values())
    left = sum(c[1] for c in denoiser_counts.values())
    return left / max(1, computed + left)
