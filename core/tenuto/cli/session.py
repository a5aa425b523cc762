"""What the commands and the app do first: how to sample, the model, its recordings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..artifact import Artifact, fingerprint
from ..errors import TenutoError
from ..lock import Lock
from ..model import denoiser_of
from ..runtime import attach
from ..sampling import (
    PipelineCall,
    Trajectory,
    check_names,
    described,
    keep,
    kept,
    one_by_one,
    record,
    repeated,
    wanted_prompts,
)
from ..sampling.loading import PREFIX, Defaults, class_of, defaults, load
from ..work import MANIFEST, Work
from .calls import fitted, with_images
from .checks import RECORDING, damage_told, device_of
from .console import Bars


@dataclass(frozen=True)
class Sampling:
    """How a command samples."""

    steps: int
    guidance: float | None
    device: torch.device
    call: dict[str, Any] = field(default_factory=dict)  # the pipeline's own keywords

    def called(self, pipe: Any) -> dict[str, Any]:
        """The keywords under the names that `pipe` has for them."""
        return fitted(type(pipe), self.call)

    def checked(self, pipe: Any) -> None:
        """TenutoError unless `pipe` can be sampled like this."""
        check_steps(pipe, self.steps)
        call = self.called(pipe)
        prompts = wanted_prompts(pipe, ("",), call)
        PipelineCall(pipe, prompts, self.steps, self.guidance, call)


@contextmanager
def work_kept_until_done(work: Path) -> Iterator[None]:
    """Keep `work` while the job is not done, unless it was refused before it began."""
    with Lock(work):
        try:
            yield
        except TenutoError:
            if not (work / MANIFEST).exists():
                Work(work / RECORDING, {}).discard()
                with suppress(OSError):
                    work.rmdir()
            raise
        Work(work, {}).discard()


def sampling_of(
    model: str,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    device: str | None = None,
    artifact: Artifact | None = None,
    file: Path | None = None,
    call: Mapping[str, Any] | None = None,
) -> Sampling:
    """Steps, guidance, call: as asked, else those of `artifact` (in `file`), else the model's own.

    Pictures that the artifact was calibrated with are looked for beside it and in the current
    folder.
    """
    usual, call = defaults(model), dict(call or {})
    if artifact is not None:
        schedule = artifact.header["schedule"]
        with damage_told(file):
            usual = Defaults.read(schedule)
            call = with_images(schedule, call, ((file or Path()).parent, Path()))
            call = repeated(schedule, call)
    return Sampling(
        usual.steps if steps is None else steps,
        usual.guidance if guidance is None else guidance,
        device_of(device),
        call,
    )


def pipeline(
    model: str,
    sampling: Sampling,
    bars: Bars,
    artifact: Artifact | None = None,
    file: Path | None = None,
    **memory: Any,
) -> Any:
    """The model, loaded and checked; `artifact` (in `file`) fits it. memory: as `load` takes it."""
    kind = class_of(model) if sampling.call else None
    if kind is not None:
        check_names(kind, fitted(kind, sampling.call))  # loading takes its time
    pipe = loaded(model, sampling.device, bars, **memory)
    sampling.checked(pipe)
    if artifact is not None:
        with damage_told(file), attach(pipe, artifact):
            pass  # it fits
    return pipe


def loaded(model: str, device: torch.device, bars: Bars, **memory: Any) -> Any:
    """A pipeline on `device`. A model of one's own is in bf16 on a GPU, all else in fp32."""
    wide = model.startswith(PREFIX) or device.type == "cpu"
    silence(bars.watched)
    return load(model, device, torch.float32 if wide else torch.bfloat16, **memory)


def check_steps(pipe: Any, steps: int) -> None:
    """TenutoError unless the model can be sampled in so many steps."""
    most = getattr(pipe.scheduler.config, "num_train_timesteps", None)
    if most is not None and steps > most:
        raise TenutoError(f"This model samples in at most {most} steps, not {steps}.")


def silence(watched: bool) -> None:
    """Keep other libraries' chatter and loading bars away; where one watches, downloads show."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()
    if not watched:
        disable_progress_bars()


def attached_to(pipe: Any, artifact: Artifact | None, execution: str) -> Any:
    """A context in which `artifact`, if there is one, is attached."""
    return nullcontext() if artifact is None else attach(pipe, artifact, execution=execution)


def recorded(
    pipe: Any,
    lines: list[str],
    sampling: Sampling,
    seed: int,
    batch: int,
    work: Path,
    bars: Bars,
    runs: int | None = None,
) -> Trajectory:
    """A recording of every prompt, or the one that an interrupted command left in `work`.

    One at a time where it is a video, or made of a picture.
    """
    call = sampling.called(pipe)
    batch = 1 if one_by_one(pipe, call) else min(batch, len(lines))
    runs = runs or -(-len(lines) // batch)
    encoder = getattr(pipe, "text_encoder", None)
    job = {
        "job": "record", "prompts": lines, "steps": sampling.steps, "guidance": sampling.guidance,
        "seed": seed, "batch": batch, "runs": runs, "device": str(sampling.device),
        "model": [fingerprint(m) for m in (denoiser_of(pipe), encoder) if m is not None],
    } | ({"call": described(call)} if call else {})  # fmt: skip
    shelf, prompts = Work(work / RECORDING, job), wanted_prompts(pipe, lines, call)
    found = kept(shelf, pipe, prompts, sampling.steps, sampling.guidance, call)
    if found is None:
        found = record(
            pipe, prompts, steps=sampling.steps, guidance=sampling.guidance, call=call, seed=seed,
            batch=batch, runs=runs, on_progress=bars("Recording"),
        )  # fmt: skip
        keep(shelf, found)
    return found
