"""What a bare denoiser answers at each step of its user's own sampler, and the kernel of that.

No scheduler says what the answers are and how much noise there is: the user of `record` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TenutoError
from ..model import all_frozen, denoiser_of, tensors_in, watched
from .output_kernel import PREDICTIONS, OutputKernel
from .remaining_error import with_remaining
from .step_outputs import Step, StepOutputs

Noise = Callable[[float], tuple[float, float]] | Sequence[tuple[float, float]]


def outputs_of(
    model: Any,
    repeat: Callable[[], Tensor] | None,
    prediction: str | None,
    noise: Noise | None,
) -> StepOutputs:
    """What looks at the outputs of a pipeline, or of a denoiser that is called by `repeat`.

    repeat(): one run of the user's own sampler, with the same noise each time. prediction, noise:
    as in `OwnOutputs`. TenutoError if they are of no use.
    """
    if (prediction is None) != (noise is None):
        raise TenutoError("`prediction` and `noise` are given together, or neither is.")
    if prediction is None or noise is None:
        return StepOutputs(model if repeat is None else None)
    if repeat is None:
        raise TenutoError("A pipeline's scheduler says `prediction` and `noise`: give neither.")
    return OwnOutputs(denoiser_of(model), repeat, prediction, noise)


class OwnOutputs(StepOutputs):
    """The outputs of every step of a bare denoiser, as it returns them.

    prediction: what they are, one of `PREDICTIONS`. noise: (alpha, sigma) of the sample, alpha * x0
    + sigma * noise, for a timestep as the denoiser gets it, or one such pair a step in the order of
    the steps; both may have any common factor. TenutoError if they are neither.
    """

    def __init__(
        self, denoiser: nn.Module, repeat: Callable[[], Tensor], prediction: str, noise: Noise
    ) -> None:
        super().__init__(None)
        self.denoiser, self.repeat, self.said, self.given = denoiser, repeat, prediction, noise
        if prediction not in PREDICTIONS:
            raise TenutoError(f"A `prediction` is one of {', '.join(PREDICTIONS)}.")
        for pair in () if callable(noise) else noise:
            self._pair(pair)

    @contextmanager
    def run(self, last: Callable[[], float | None]) -> Iterator[None]:
        """One run of the sampler. last: the timestep of the denoiser's last call.

        The first calls of all steps are looked at together, then the second ones: a sampler that
        guides may make two.
        """
        found: dict[float, list[Tensor]] = {}

        def note(name: str, args: object, kwargs: object, out: object) -> None:
            now, answer = last(), next(tensors_in(out), None)
            if now is not None and answer is not None:
                kept = answer.detach().to("cpu", torch.float32, copy=True)
                found.setdefault(now, []).append(kept)

        with watched(self.denoiser, after=note):
            yield
        counts = {len(answers) for answers in found.values()}
        if isinstance(self.given, Sequence) and len(self.given) != len(found):
            raise TenutoError(
                f"`noise` has {len(self.given)} pairs, and the sampler made {len(found)} steps."
            )
        for number in range(counts.pop() if len(counts) == 1 else 0):
            self._add({time: Step(time, answers[number]) for time, answers in found.items()})

    def kernel(self) -> OutputKernel | None:
        """Of all runs, with what is left of an error; runs the sampler again to see that."""
        found = super().kernel()
        if found is None:
            return None
        with torch.no_grad(), all_frozen([self.denoiser]):
            return with_remaining(found, self.denoiser, self.repeat)

    def prediction(self) -> str | None:
        """As the user said."""
        return self.said

    def noise(self, timestep: float) -> tuple[float, float] | None:
        """(alpha, sigma) at a timestep, as the user said: squares, of a flow shares, add up to 1.

        TenutoError if it is none.
        """
        row = list(self.steps or ()).index(timestep)
        return self._pair(self.given(timestep) if callable(self.given) else self.given[row])

    def _pair(self, given: object) -> tuple[float, float]:
        try:
            alpha, sigma = (float(x) for x in given)  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            raise TenutoError("`noise` says (alpha, sigma), two numbers, of each step.") from error
        total = alpha + sigma if self.said == "flow" else math.hypot(alpha, sigma)
        if not (alpha >= 0 and sigma >= 0 and 0 < total < math.inf):
            raise TenutoError(f"({alpha:g}, {sigma:g}) is no share of image and of noise.")
        return alpha / total, sigma / total
