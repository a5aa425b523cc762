"""What the commands and the app do first: how to sample, the model, its recordings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..artifact import Artifact, fingerprint
from ..caching import Speedup
from ..calibration import ENCODERS, QUANTIZE, ROUTER, Check, check
from ..calibration.check.peak import kept_to
from ..errors import ArtifactError, TenutoError
from ..files import clear_parts
from ..lock import Lock
from ..model import denoisers_of, encoders_of
from ..numerics import Scheme
from ..resume import MANIFEST, Work
from ..runtime import attach
from ..sampling import (
    PipelineCall,
    Skeleton,
    Trajectory,
    check_names,
    check_needed,
    check_steps,
    described,
    keep,
    kept,
    one_by_one,
    processes,
    record,
    repeated,
    skeleton,
    wanted_prompts,
    work_in,
)
from ..sampling.libraries import silence
from ..sampling.loading import PREFIX, Defaults, class_of, defaults, folder_of, load
from ..sampling.weight_files import parts_in
from .calls import fitted, with_images
from .checks import RECORDING, check_encoders, damage_told, device_of
from .console import Bars

STAGES = {QUANTIZE: ("Recording", "Quantizing"), ENCODERS: ("Text encoders",),
          ROUTER: ("Recording", "Training the router")}  # fmt: skip


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
def work_kept_until_done(work: Path, out: Path) -> Iterator[None]:
    """Keep `work` while `out` is not done, unless the job was refused before it began."""
    first = processes().first  # it alone writes
    with Lock(work) if first else nullcontext():
        clear_parts(out) if first else None
        try:
            yield
        except TenutoError:
            if first and not (work / MANIFEST).exists():
                Work(work / RECORDING, {}).discard()
                with suppress(OSError):
                    work.rmdir()
            raise
        processes().meet()
        if first:
            Work(work, {}).discard()


def written(made: Sequence[Artifact], out: Path) -> Artifact:
    """What was made, of the denoisers and of the encoders, as one artifact, written once."""
    whole = made[0] if len(made) == 1 else made[0] | made[1]
    processes().once(lambda: whole.save(out))
    return whole


def sampling_of(
    model: str,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    device: str | None = None,
    artifact: Artifact | None = None,
    file: Path | None = None,
    call: Mapping[str, Any] | None = None,
    images: Path | None = None,
) -> Sampling:
    """Steps, guidance, call: as asked, else those of `artifact` (in `file`), else the model's own.

    Images that the artifact was calibrated with are looked for beside it, and in `images`, else
    the current folder.
    """
    usual, call = defaults(model), dict(call or {})
    if artifact is not None:
        schedule = artifact.header["schedule"]
        with damage_told(file):
            usual = Defaults.read(schedule)
            call = with_images(schedule, call, ((file or Path()).parent, images or Path()))
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
    *,
    use: str | None = None,
    scheme: Scheme | None = None,
    encoder: str | None = None,
    effort: Mapping[str, Any] | None = None,
    max_memory: int | None = None,
    **memory: Any,
) -> Any:
    """The model, loaded and checked; `artifact` (in `file`) fits it.

    use: one of `calibration.USES`; the model is checked for it, before it is loaded where that can
    be. For "quantize": to this scheme and its text encoders to this width; what is None is not.
    effort: what else the check takes. max_memory: bytes that it is kept to, else TenutoError.
    memory: as `load` takes it.
    """
    check_call(model, sampling.call, artifact)  # loading takes its time
    uses = () if use is None else (use,)
    if use == "quantize":
        uses = (use,) * (scheme is not None) + (ENCODERS,) * (encoder is not None)
    given = sampling, scheme, encoder is not None
    found = checked(model, *given, **effort or {}) if uses else None
    _refused(found, uses, bars)
    bars.stages = [stage for use in uses for stage in STAGES.get(use, ())]
    if max_memory is not None:
        if found is None:
            raise TenutoError(
                f"What {model} takes, only a folder tells: download it, and name that."
            )
        most = max_memory // processes().size  # each has a model of its own
        memory["low_memory"] = kept_to(found.memory, most, memory["low_memory"])
    pipe = loaded(model, sampling.device, bars, **memory)
    check_encoders(pipe, encoder)
    sampling.checked(pipe)
    if uses and found is None:
        _refused(checked(pipe, *given, **effort or {}), uses, bars)
    if artifact is not None:
        with damage_told(file), attach(pipe, artifact):
            pass  # it fits
    return pipe


def check_call(model: str, call: Mapping[str, Any], artifact: Artifact | None = None) -> None:
    """TenutoError unless such a model's pipeline takes a call, as far as its class tells.

    Where it does not, and has no part of the class that `artifact` was made for, that is said.
    """
    kind = class_of(model)
    if kind is None:
        return
    try:
        found = fitted(kind, call)
        check_names(kind, found)
        check_needed(kind, found)
    except TenutoError as error:
        folder, made = folder_of(model), artifact and artifact.header["model_class"]
        own = [name for _, (_, name) in parts_in(folder)] if folder else []
        if made is None or not own or made in own:
            raise
        said = f"The artifact was made for another model: for {made}, and there is none in {model}."
        raise ArtifactError(said) from error


def checked(
    model: Any, sampling: Sampling, scheme: Scheme | None, encoder: bool, **options: Any
) -> Check | None:
    """What `check` says of a model that is to be sampled like this.

    model: a pipeline, or a name: it is not loaded, and None is returned where only that tells.
    """
    given = skeleton(model) if isinstance(model, str) else model
    if given is None:
        return None
    call = sampling.called(given.pipe if isinstance(given, Skeleton) else given)
    return check(
        given, scheme=scheme or "w8a8", text_encoder=encoder, steps=sampling.steps,
        guidance=sampling.guidance, call=call, device=sampling.device, **options,
    )  # fmt: skip


def _refused(found: Check | None, uses: tuple[str, ...], bars: Bars) -> None:
    """TenutoError with what stops one of `uses`; what does not is worth a line each."""
    if found is None:
        return
    for use in uses:
        found.refuse(use)
    for sentence in found.warnings(*uses):
        bars.note(sentence)


def loaded(model: str, device: torch.device, bars: Bars, **memory: Any) -> Any:
    """A pipeline on `device`. A model of one's own is in bf16 on a GPU, all else in fp32."""
    wide = model.startswith(PREFIX) or device.type == "cpu"
    silence(bars.watched)
    return load(model, device, torch.float32 if wide else torch.bfloat16, **memory)


def attached_to(
    pipe: Any,
    artifact: Artifact | None,
    execution: str,
    speedup: Speedup | None = None,
    **how: Any,
) -> Any:
    """A context with `artifact`, if any, attached. how: as `how_called` says."""
    if artifact is None and speedup is None:
        return nullcontext()
    return attach(pipe, artifact, execution=execution, speedup=speedup, **how)


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

    One at a time where it is a video, or made from an image.
    """
    call = sampling.called(pipe)
    batch = 1 if one_by_one(pipe, call) else min(batch, len(lines))
    runs = runs or -(-len(lines) // batch)
    models = (*denoisers_of(pipe).values(), *encoders_of(pipe).values())
    job = {
        "job": "record", "prompts": lines, "steps": sampling.steps, "guidance": sampling.guidance,
        "seed": seed, "batch": batch, "runs": runs, "device": str(sampling.device),
        "model": [fingerprint(m) for m in models],
    } | ({"call": described(call)} if call else {})  # fmt: skip
    shelf, prompts = work_in(work / RECORDING, job), wanted_prompts(pipe, lines, call)
    found = kept(shelf, pipe, prompts, sampling.steps, sampling.guidance, call)
    if found is None:
        found = record(
            pipe, prompts, steps=sampling.steps, guidance=sampling.guidance, call=call, seed=seed,
            batch=batch, runs=runs, on_progress=bars("Recording"),
        )  # fmt: skip
        keep(shelf, found)
    return found


def low_encoders(
    pipe: Any,
    width: str,
    lines: list[str],
    sampling: Sampling,
    method: str | None,
    seed: int,
    work: Path,
    bars: Bars,
    max_memory: int | None,
) -> Artifact:
    """The text encoders of a pipeline, in weights of `width`."""
    from ..calibration import quantize_encoder

    return quantize_encoder(
        pipe, width, lines, method=method or "gptq", seed=seed, steps=sampling.steps,
        guidance=sampling.guidance, call=sampling.called(pipe), device=sampling.device,
        max_memory=max_memory, work=work, on_progress=bars("Text encoders"),
    )  # fmt: skip
