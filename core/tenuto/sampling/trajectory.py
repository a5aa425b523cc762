"""Recorded sampling runs: the calibration set, and what router training rolls out again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..errors import TenutoError
from .output_kernel import OutputKernel

Sample = Callable[[Any, int, int], Tensor]  # (denoiser, seed, batch)


@dataclass(frozen=True)
class Call:
    """One call of a denoiser or a text encoder: its arguments by name (on the CPU), step and run.

    counted: (B, L), 1 where a token is looked at by what follows; None: all are. read: what the
    pipeline reads of a text encoder: numbers of hidden states, names of entries; (): the first.
    denoiser: which of a pipeline's, "" for the main one (`parts_of`). weight: what its errors count
    beside those of other calls.
    """

    run: int
    row: int
    timestep: float
    inputs: dict[str, Any]
    counted: Tensor | None = None
    read: tuple[int | str, ...] = ()
    denoiser: str = ""
    weight: float = 1.0


@dataclass
class Trajectory:
    """Calls of one or more sampling runs and what is needed to repeat them.

    timesteps: those that were visited, each once, in executed order. steps: as many as were asked
    for: image-to-image visits fewer, second-order schedulers more, and rounding makes equal ones.
    call: how the pipeline was called beside that, as `described` says. sample: `sample(denoiser,
    seed, batch)` runs one trajectory and returns the images, float (batch, C, H, W) in [-1, 1], a
    video as its frames (batch * F, C, H, W); latent: the same, but final latents. kernel: of the
    outputs, where a pipeline was recorded whose scheduler says what it takes them for. whole: the
    timesteps of the run, where these are those of one of its denoisers alone. under: of calls that
    were made with others skipped (`under_cache`), how; they are not of every timestep.
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
    whole: tuple[float, ...] = ()
    under: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str, others: Mapping[str, nn.Module] | None = None) -> Trajectory:
        """The part of one denoiser, as `parts_of` names it: its calls and the timesteps of these.

        `sample` and `latent` of the part take another such denoiser; `others`, by name, are in the
        pipeline meanwhile. TenutoError if the denoiser is not called in the recording.
        """
        calls = [call for call in self.calls if call.denoiser == name]
        if not calls:
            raise TenutoError(
                f"The recording has no call of {name or 'the main denoiser'}: record a run that "
                "reaches it, of more steps."
            )
        first = calls[0].run
        times = tuple(dict.fromkeys(c.timestep for c in calls if c.run == first))
        sample, latent = (_of(s, name, others or {}) for s in (self.sample, self.latent))
        own = self.call.get(f"guidance_scale{name[-2:]}") if name[-2:-1] == "_" else None
        return replace(
            self,
            timesteps=times,
            calls=[replace(c, row=nearest(times, c.timestep)) for c in calls],
            guidance=self.guidance if own is None else own,
            sample=sample,
            latent=latent,
            whole=() if times == self.timesteps else self.timesteps,
        )

    def rollout(self) -> Sample:
        """The function that runs one trajectory and returns what is measured: latents if it can."""
        found = self.latent or self.sample
        if found is None:
            raise TenutoError("This trajectory cannot be run again: pass `sample=`.")
        return found

    def schedule(self) -> dict[str, Any]:
        """The sampling schedule as an artifact's header has it."""
        return (
            {
                "timesteps": list(self.timesteps),
                "steps": self.steps,
                "guidance": self.guidance,
            }
            | ({"run": list(self.whole)} if self.whole else {})
            | self.called()
        )

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


def nearest(times: Sequence[float], timestep: float) -> int:
    """The row of the nearest of `times`."""
    return min(range(len(times)), key=lambda i: abs(times[i] - timestep))


def _of(sample: Sample | None, name: str, others: Mapping[str, nn.Module]) -> Sample | None:
    """`sample`, which takes the denoiser called `name`; None where it can take the main one only.

    The samplers of pipelines have `of`; a user's function does not.
    """
    if not name and not others:
        return sample
    return sample.of(name, others) if hasattr(sample, "of") else None  # type: ignore[attr-defined]
