"""What quantization adds to each step's output, for the plan of a forecast.

A forecast combines few computed outputs, some with large weights. Where each has an error of its
own, these are not averaged away as in a full run, and it is better to combine them more evenly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..model import all_frozen, denoiser_of, device_and_dtype, override_
from ..progress import Progress
from ..runtime import attach
from ..sampling import Trajectory
from ..sampling.record import Sampler
from ..sampling.step_outputs import GuidedOutputs
from .replay import arguments
from .under_cache import starts_of


def with_rounding(
    model: Any, artifact: Artifact, trajectory: Trajectory, on_progress: Progress | None = None
) -> Artifact:
    """`artifact` with the header's `forecast.rounding`: the mean squared error of each step.

    Of what guidance makes of the outputs, on the calls of the first recorded run of a pipeline of
    one denoiser: nothing is added where it is none, or where such an error is not finite.
    """
    kernel, sample = trajectory.kernel, trajectory.latent
    if kernel is None or not isinstance(sample, Sampler) or "forecast" not in artifact.header:
        return artifact
    found = added_errors(model, artifact, trajectory, on_progress)
    if any(t not in found for t in kernel.timesteps):
        return artifact
    errors = [float(found[t].double().square().mean()) for t in kernel.timesteps]
    if all(0 <= error < 1e9 for error in errors):
        rounded = [float(f"{error:.4g}") for error in errors]
        artifact.header["forecast"] = artifact.header["forecast"] | {"rounding": rounded}
    return artifact


def added_errors(
    model: Any, artifact: Artifact, trajectory: Trajectory, on_progress: Progress | None = None
) -> dict[float, Tensor]:
    """What quantization adds to the output of each timestep, as guidance makes it of both halves.

    model: a pipeline of one denoiser, which answers to the recorded calls of the first run whatever
    it was made to answer before. Tensors are of the shape of a step's output.
    """
    count = len(trajectory.timesteps)

    def note(done: int) -> None:
        if on_progress is not None:
            on_progress(done, 2 * count, "what rounding adds")

    note(0)
    right = _handed(model, trajectory)
    note(count)
    how: Any = {"route": False, "speedup": 1, "execution": "int8", "graphs": False}
    with attach(model, artifact, **how):
        found = _handed(model, trajectory)
    note(2 * count)
    return {t: found[t] - right[t] for t in right if t in found}


def _handed(model: Any, trajectory: Trajectory) -> dict[float, Tensor]:
    """What the pipeline hands to its scheduler at each timestep, of the first recorded run.

    The denoiser answers to what it got in the recording, whatever it is given.
    """
    denoiser, sample = denoiser_of(model), trajectory.rollout()
    calls = [call for call in trajectory.calls if call.run == 0]
    device, (seed, batch) = device_and_dtype(denoiser)[0], starts_of(trajectory)[0]
    left, last = iter(calls), list[float]()

    def forward(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = next(left)
        last[:] = [call.timestep]
        return original(**arguments(denoiser, call, device))

    seen, patch = GuidedOutputs(model), override_(denoiser, forward)
    try:
        with all_frozen([denoiser]), torch.no_grad(), seen.run(lambda: last[0] if last else None):
            sample(denoiser, seed, batch)
    finally:
        patch.remove()
    return dict(seen.outputs)
