"""The router of HarmoniCa (arXiv 2410.01723): a table of logits trained on its own trajectories.

Step-wise denoising training (SDT) with an image-error-proxy objective (IEPO): row t of the logits
is updated at denoising step t by the loss
    lambda(t) * MSE(teacher, student) + beta * sum_k cost_k r[t, k],   r = sigmoid(logits).
Teacher and student get the same x_t of the student's trajectory; the denoiser stays frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...caching import CacheSchedule
from ...errors import TenutoError
from ...progress import Progress
from ...resume import Work
from ...sampling import Trajectory
from .iepo import RULES
from .logits import Router
from .training import Training

STORES, WEIGHTINGS = ("mixture", "fresh"), ("gain", "none", *RULES)
ESTIMATORS, ERRORS = ("soft", "straight-through"), ("additive", "coherent")
INPUTS = ("student", "full run")


@dataclass(frozen=True)
class HarmoniCa:
    """Settings of the training.

    reuse: the share of cells to reuse; beta is then found on the way, and at the end the cells are
    ranked by r and cut at that share. With `beta` given (and reuse None) the table is r > tau.
    iterations: whole trajectories of `batch` images; each updates every row once.
    weighting: the rule of lambda: "gain" (`iepo.gain`, measured once), "paper", "code" or "none".
    refresh: denoising steps after which "paper" and "code" measure lambda anew (their C).
    store: "mixture" as released, or "fresh". pace: how far log beta follows a miss of
    the budget that lasts through the whole training.

    Two things that the paper has not, 0 turns them off:
    joint: the rate of a second AdamW step on the mean of each row. Branches of one step are better
    reused together than one by one, which no single cell's gradient shows.
    credit: steps over which the loss reaches back through what the slots hold (elementwise, not
    through the denoiser), so that a row learns what computing it is worth to the rows after it.
    It keeps that many outputs of every branch in memory.

    estimator: "soft" mixes in training too, as released; "straight-through" computes or reuses as
    the schedule will (r > 1/2), with the gradient of the mixture. error: "additive" adds up the
    weighted errors of steps, as released; "coherent" adds the errors themselves, as vectors, before
    they are squared: those of one run point the same way.
    inputs: "student", as SDT; "full run": Learning-to-Cache (arXiv 2406.01733): every other row is
    full, and each step gets the inputs of the model's own full run.

    The released settings are lr 0.01, tau 0.1, beta 7e-8, weighting "code", joint 0, credit 0,
    estimator "soft", error "additive", batch 32 and 2,000 trajectories; a few trajectories need a
    larger lr. Logits are kept in [-5, 5] with `beta` alone: where they are ranked, rows that sank
    as far as that would be in one heap, and the order among them lost.
    """

    reuse: float | None = 0.3
    beta: float | None = None
    iterations: int = 24
    batch: int = 1
    lr: float = 0.25
    joint: float = 1.0
    credit: int = 20
    tau: float = 0.0
    weighting: str = "gain"
    refresh: int = 500
    store: str = "mixture"
    estimator: str = "soft"
    error: str = "additive"
    inputs: str = "student"
    pace: float = 24.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.reuse is None) == (self.beta is None):
            raise TenutoError("A router takes either a reuse ratio or a beta.")
        if self.weighting not in WEIGHTINGS:
            raise TenutoError(f"Unknown weighting {self.weighting!r}: one of {WEIGHTINGS}.")
        for name, known in (
            ("store", STORES), ("estimator", ESTIMATORS), ("error", ERRORS), ("inputs", INPUTS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise TenutoError(f"Unknown {name} {getattr(self, name)!r}: one of {known}.")
        if self.iterations < 1 or self.batch < 1:
            raise TenutoError("A router needs one trajectory of one image or more.")

    def __call__(
        self,
        denoiser: nn.Module,
        trajectory: Trajectory,
        branches: Sequence[str],
        *,
        costs: Sequence[float] | None = None,
        gains: Tensor | None = None,
        start: CacheSchedule | None = None,
        work: Work | None = None,
        on_progress: Progress | None = None,
    ) -> Router:
        """Train a router for `branches` of `denoiser`, which is unchanged afterwards.

        costs: what each branch costs (multiply-adds), for beta and the budget; None: all alike, the
        plain sum of the paper. gains: (T,) of `iepo.gain`, else measured first. start: begin at
        this schedule and not at random. work: finished trajectories are kept there.
        """
        training = Training(self, denoiser, trajectory, branches, costs)
        if gains is not None:
            training.weights = gains
        if start is not None:
            training.begin_at(start)
        return training.run(work or Work(None, {}), on_progress)
