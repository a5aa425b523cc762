"""One training run of a router's logits: trajectories, updates of each row, the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...caching import CacheSchedule
from ...errors import TenutoError
from ...model import frozen
from ...progress import Progress
from ...resume import Work
from ...sampling import Clock, Trajectory
from .iepo import RULES, gain
from .logits import Router
from .mixing import mixed
from .rollout import Guide, intercepted, step_costs
from .student import Student

if TYPE_CHECKING:
    from .harmonica import HarmoniCa

LIMIT = 5.0  # the first row is the constant 5, and with a threshold logits stay in [-5, 5]
HEAD_START = 1.5  # how far from zero logits are that begin at a schedule


class Training:
    """One training run: the logits, AdamW's moments of each row, lambda and beta."""

    STATE = ("logits", "mean", "square", "row_mean", "row_square", "updates", "weights")

    def __init__(
        self,
        settings: HarmoniCa,
        denoiser: nn.Module,
        trajectory: Trajectory,
        branches: Sequence[str],
        costs: Sequence[float] | None = None,
    ) -> None:
        self.settings, self.denoiser, self.trajectory = settings, denoiser, trajectory
        self.times, self.branches = trajectory.timesteps, tuple(branches)
        shape = (len(self.times), len(self.branches))
        if shape[0] < 2 or not self.branches:
            raise TenutoError("A router needs two steps or more and a branch that can be reused.")
        price = torch.tensor(list(costs or [1.0] * shape[1]), dtype=torch.float64)
        self.costs = (price / price.mean()).float()
        generator = torch.Generator().manual_seed(settings.seed)
        self.logits = torch.randn(shape, generator=generator)
        self.free = list(range(1, shape[0]))  # rows that are trained
        if settings.inputs == "full run":
            self.free = self.free[::2]
        self._close()
        self.mean, self.square = torch.zeros(shape), torch.zeros(shape)
        self.row_mean, self.row_square = torch.zeros(shape[0], 1), torch.zeros(shape[0], 1)
        self.updates, self.benefit = torch.zeros(shape[0]), torch.zeros(shape)
        self.weights = torch.zeros(0)
        self.log_beta = math.nan if settings.beta is None else math.log(settings.beta)
        self.history: list[list[float]] = []  # loss, share reused, beta

    def begin_at(self, schedule: CacheSchedule) -> None:
        """Logits near those of `schedule` instead of random ones."""
        self.logits = self.logits * 0.1 + torch.where(schedule.table, HEAD_START, -HEAD_START)
        self._close()

    def _close(self) -> None:
        """Rows that are not trained always compute."""
        closed = torch.ones(len(self.logits), dtype=torch.bool)
        closed[self.free] = False
        self.logits[closed] = LIMIT

    def run(self, work: Work, on_progress: Progress | None) -> Router:
        """Every trajectory, from `work` as far as it is finished."""
        total = self.settings.iterations
        done = next((i for i in range(total, 0, -1) if self._load(work, i)), 0)
        for i in range(done, total + 1):
            if on_progress:
                on_progress(i, total, f"router: {self.share():.0%} reused" if i else "router")
            if i < total:
                with frozen(self.denoiser), torch.no_grad():
                    self._prepare(i)
                    self._trajectory(i)
                self._save(work, i + 1)
        rows = ({"loss": loss, "reuse": reused, "beta": b} for loss, reused, b in self.history)
        beta = math.exp(self.log_beta)
        return Router(self.logits, self.times, self.branches, self.costs, beta, tuple(rows))

    def share(self) -> float:
        """The share of cells, by cost, that the router reuses rather than computes."""
        reused = (self.logits < 0).float() * self.costs
        return float(reused.sum() / (len(self.times) * self.costs.sum()))

    def row(self, row: int) -> Tensor:
        """r (N,) of a step."""
        return torch.sigmoid(self.logits[row])

    def _seed(self, i: int) -> int:
        return self.trajectory.seed + self.settings.seed * 1009 + i * self.settings.batch

    def _prepare(self, i: int) -> None:
        """lambda (T,), where this trajectory needs a new one."""
        rule, steps, every = self.settings.weighting, len(self.times), self.settings.refresh
        if rule in RULES:
            if i == 0 or i * steps // every > (i - 1) * steps // every:
                r = torch.sigmoid(self.logits)
                r[0] = 1
                self.weights = RULES[rule](lambda weights: self._sampled(weights, self._seed(i)), r)
        elif rule == "none":
            self.weights = torch.ones(steps)
        elif not self.weights.numel():
            batch = self.settings.batch
            found = step_costs(self.denoiser, self.trajectory, self.branches, self._seed(i), batch)
            self.weights = gain(*found)

    def _sampled(self, weights: Tensor, seed: int) -> Tensor:
        """The final latents under soft decisions `weights` (T, N)."""

        def attend(clock: Clock) -> Callable[..., Any]:
            def forward(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                mixer.set(weights[clock.step])
                return original(*args, **kwargs)

            return forward

        settings = self.settings
        with (
            intercepted(self.denoiser, self.times, call=attend) as clock,
            mixed(self.denoiser, self.branches, clock, settings.tau, settings.store) as mixer,
        ):
            return self.trajectory.rollout()(self.denoiser, seed, settings.batch)

    def _trajectory(self, i: int) -> None:
        """One trajectory of the student; then each row that it passed is updated once."""
        settings, losses = self.settings, []
        coherent = settings.error == "coherent"
        slopes: dict[int, Tensor] = {}

        def learn(row: int, loss: float, found: dict[int, Tensor]) -> None:
            weight = 1.0 if coherent else float(self.weights[row])
            losses.append(weight * loss)
            for k, slope in found.items():
                slopes[k] = slopes.get(k, 0) + weight * slope

        guide = Guide(self.denoiser, self.trajectory.guidance, settings.batch)
        student = Student(
            self.row, learn, guide, settings.credit, offset=i,
            hard=settings.estimator == "straight-through",
            gains=self.weights.clamp_min(0).sqrt().tolist() if coherent else None,
            free=None if settings.inputs == "student" else self.free,
        )  # fmt: skip
        with (
            intercepted(self.denoiser, self.times, call=student.attend) as clock,
            mixed(self.denoiser, self.branches, clock, settings.tau, settings.store) as mixer,
        ):
            student.mixer = mixer
            self.trajectory.rollout()(self.denoiser, self._seed(i), settings.batch)
        if not losses:
            raise TenutoError("`sample` made no denoiser call after its first step.")
        for row, slope in sorted(slopes.items()):
            self._learn(row, slope)
        self._steer()
        self.history.append([sum(losses), self.share(), math.exp(self.log_beta)])

    def _learn(self, row: int, slope: Tensor) -> None:
        """AdamW steps (no weight decay) on a row; slope (N,): gradient of the weighted MSE to r."""
        self.benefit[row] = -slope / self.costs
        if math.isnan(self.log_beta):
            return
        r = self.row(row)
        grad = (math.exp(-self.log_beta) * slope + self.costs) * r * (1 - r)  # the loss over beta
        self.updates[row] += 1
        n = float(self.updates[row])
        self.logits[row] -= self.settings.lr * _adam(self.mean[row], self.square[row], grad, n)
        shared = _adam(self.row_mean[row], self.row_square[row], grad.mean()[None], n)
        self.logits[row] -= self.settings.joint * shared
        if self.settings.reuse is None:
            self.logits[row].clamp_(-LIMIT, LIMIT)

    def _steer(self) -> None:
        """Move beta so that the share of reused cells goes to the budget.

        The first trajectory only looks: beta begins where that share of cells would gain less.
        """
        wanted = self.settings.reuse
        if wanted is None:
            return
        if math.isnan(self.log_beta):
            level = min(1.0, wanted * len(self.times) / len(self.free))
            least = torch.quantile(self.benefit[self.free].clamp_min(0), level)
            self.log_beta = math.log(max(float(least), 1e-20))
        else:
            missing = wanted - self.share()
            self.log_beta += self.settings.pace / self.settings.iterations * missing

    def _save(self, work: Work, done: int) -> None:
        state = {name: getattr(self, name) for name in self.STATE}
        state["beta"] = torch.tensor([self.log_beta], dtype=torch.float64)
        state["history"] = torch.tensor(self.history, dtype=torch.float64)
        work.save(f"router/{done:05d}", {k: v.clone() for k, v in state.items()})

    def _load(self, work: Work, done: int) -> bool:
        kept = work.load(f"router/{done:05d}")
        if kept is None:
            return False
        for name in self.STATE:
            setattr(self, name, kept[name].clone())
        self.log_beta = float(kept["beta"])
        self.history = kept["history"].tolist()
        return True


def _adam(mean: Tensor, square: Tensor, grad: Tensor, n: float) -> Tensor:
    """The direction of Adam's n-th step; `mean` and `square` are its moments, changed in place."""
    mean.lerp_(grad, 0.1)
    square.lerp_(grad.square(), 0.001)
    return mean / (1 - 0.9**n) / ((square / (1 - 0.999**n)).sqrt() + 1e-8)
