"""What the sampler of a MODEL gets at every step of a recorded run, and the kernel of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from tenuto.model import tensors_in, watched
from tenuto.sampling import OutputKernel, host_noise, host_prediction
from tenuto.sampling.step_outputs import Step, StepOutputs, step_seen

from .wrapping import timesteps

KEY = "tenuto_outputs"


class HostOutputs(StepOutputs):
    """As `StepOutputs` of a pipeline: the host's model sampling says what its scheduler would.

    noisy: whether the sampler adds noise of its own; there is no kernel then.
    """

    def __init__(self, model: Any, noisy: bool) -> None:
        super().__init__(None)
        self.sampling = model.get_model_object("model_sampling")
        self.said, self.known = host_prediction(self.sampling), host_noise(self.sampling)
        self.noisy = noisy
        self.found: dict[float, Step] = {}
        self.model = model.clone()
        self.model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self._evaluating)

    @contextmanager
    def run(self, last: Callable[[], float | None] = lambda: None) -> Iterator[None]:
        """One run of `model`."""
        self.found = {}
        with watched(self.model.model.diffusion_model, after=self._answered):
            yield
        self._add(self.found)

    def kernel(self) -> OutputKernel | None:
        """Of all runs, in tensors that are no longer of the host's inference mode."""
        with torch.inference_mode(False):
            return super().kernel()

    def _answered(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        found = next(tensors_in(out), None)
        if found is not None:
            self.answers = [*self.answers[-2:], found.detach()]

    def _evaluating(self, executor: Any, x: Tensor, sigma: Tensor, *args: Any, **more: Any) -> Any:
        """An evaluation of the sampler: what guidance makes of the answers, as the model's own."""
        self.answers = []
        denoised = executor(x, sigma, *args, **more)
        time = float(timesteps(self.sampling, sigma.reshape(-1)[:1])[0])
        self.found[time] = step_seen(time, self._output(denoised, x, sigma), self.answers)
        self.answers = []
        return denoised

    def _output(self, denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Which output of the model is `denoised` to the host, for which that is a line."""
        zero, line = torch.zeros_like(x), self.sampling.calculate_denoised
        start, slope = line(sigma, zero, x), line(sigma, torch.ones_like(x), zero)
        return (denoised - start) / slope

    def prediction(self) -> str | None:
        """As the host says."""
        return self.said

    def noise(self, timestep: float) -> tuple[float, float] | None:
        """(alpha, sigma) at a timestep of the denoiser's; None where the host does not say."""
        return None if self.known is None else self.known((timestep,))[0]

    def _between(self) -> list[tuple[float, float, float]]:
        """(timestep, alpha, sigma) between the steps of the run and at the ends of the table."""
        if self.known is None:
            return []
        times = [*(self.steps or ())]
        wanted = {(a + b) / 2 for a, b in pairwise(times)} | {self.known.times[i] for i in (0, -1)}
        found = sorted(wanted - {*times})
        return [(t, *pair) for t, pair in zip(found, self.known(found), strict=True)]
