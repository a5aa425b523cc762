"""Recorded sampling runs: the calibration set, and what router training rolls out again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import TenutoError
from .output_kernel import OutputKernel

Sample = Callable[[nn.Module, int, int], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a denoiser or a text encoder: its arguments by name (on the CPU), step and run.

    counted: (B, L), 1 where a token is looked at by what follows; None: all are. read: what the
    pipeline reads of a text encoder: numbers of hidden states, names of entries; (): the first.
    """

    run: int
    row: int
    timestep: float
    inputs: dict[str, Any]
    counted: Tensor | None = None
    read: tuple[int | str, ...] = ()


@dataclass
class Trajectory:
    """Calls of one or more sampling runs and what is needed to repeat them.

    timesteps: those that were visited, each once, in executed order. steps: as many as were asked
    for: image-to-image visits fewer, second-order schedulers more, and rounding makes equal ones.
    call: how the pipeline was called beside that, as `described` says. sample: `sample(denoiser,
    seed, batch)` runs one trajectory and returns the images, float (batch, C, H, W) in [-1, 1], a
    video as its frames (batch * F, C, H, W); latent: the same, but final latents. kernel: of the
    outputs, where a pipeline was recorded whose scheduler says what it takes them for.
    """

    timesteps: tuple[float, ...]
    calls: list[Call]
    seed: int
    batch: int
    runs: int
    steps: int
    guidance: float | None = None
    prompts: tuple[str, ...] = ()
    sample: Sample | None = field(default=None, repr=False)
    latent: Sample | None = field(default=None, repr=False)
    call: dict[str, Any] = field(default_factory=dict)
    kernel: OutputKernel | None = field(default=None, repr=False)

    def rollout(self) -> Sample:
        """The function that runs one trajectory and returns what is measured: latents if it can."""
        found = self.latent or self.sample
        if found is None:
            raise TenutoError("This trajectory cannot be run again: pass `sample=`.")
        return found

    def schedule(self) -> dict[str, Any]:
        """The sampling schedule as an artifact's header has it."""
        return {
            "timesteps": list(self.timesteps),
            "steps": self.steps,
            "guidance": self.guidance,
        } | self.called()

    def about(self) -> dict[str, Any]:
        """What decides its content, as plain data: for a manifest or a header."""
        text = "\n".join(self.prompts)
        return {
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "batch": self.batch,
            "runs": self.runs,
            "timesteps": list(self.timesteps),
            "prompts": hashlib.sha256(text.encode()).hexdigest()[:16],
        } | self.called()

    def called(self) -> dict[str, Any]:
        """How the pipeline was called, for a header: {"call": ...}, or nothing."""
        return {"call": self.call} if self.call else {}
