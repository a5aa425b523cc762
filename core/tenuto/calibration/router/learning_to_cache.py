"""Training of Learning-to-Cache (arXiv 2406.01733): gates of every other step, on the full run.

As published, each iteration draws one step, noises a real image to it, fills the cache by a full
pass, makes one DDIM step and trains the next row. Here the inputs are those of the model's own full
run, so that no images are needed, and an iteration trains every other row of a whole run.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...progress import Progress
from ...resume import Work
from ...sampling import Trajectory
from .effort import PRESETS
from .harmonica import HarmoniCa


def train_gates(
    denoiser: nn.Module,
    trajectory: Trajectory,
    branches: Sequence[str],
    reuse: float,
    preset: str = "quick",
    seed: int = 0,
    work: Work | None = None,
    on_progress: Progress | None = None,
) -> Tensor:
    """Gates, logits (T, N), of `branches` for `caching.LearningToCache` at the share `reuse`.

    No more than half of all cells can be reused. preset: iterations and batch, as of a router.
    """
    plan = PRESETS[preset].router
    settings = HarmoniCa(
        reuse=reuse, iterations=plan.iterations, batch=plan.batch, seed=seed, joint=0.0, credit=0,
        weighting="none", store="fresh", inputs="full run",
    )  # fmt: skip
    return settings(denoiser, trajectory, branches, work=work, on_progress=on_progress).logits
