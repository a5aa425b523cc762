"""What the commands of `tenuto` do. Everything that can be checked is, before a model is loaded."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .artifact import Artifact, fingerprint
from .attachment import attach
from .checks import (
    RECORDING,
    calibration_prompts,
    check_file,
    check_out,
    check_picture,
    comparison_prompts,
    damage_told,
    device_of,
    load_artifact,
)
from .console import Answer, Bars, about, facts_of, mib
from .cost import resident_weight_bytes
from .demo import PREFIX, Defaults, check_model, defaults, load
from .errors import TenutoError
from .patching import denoiser_of
from .tape import keep, kept
from .trajectory import Trajectory, record
from .work import MANIFEST, Work


@dataclass(frozen=True)
class Sampling:
    """How a command samples."""

    steps: int
    guidance: float | None
    device: torch.device


def quantize(args: Namespace, bars: Bars) -> Answer:
    """`tenuto quantize`: record, quantize, save."""
    from .calibrate import effort, quantize
    from .compact import compact
    from .maintenance import check_choice
    from .scheme import named

    scheme, preset = named(args.scheme), effort(args.preset)
    check_choice(args.temporal)
    check_model(args.model)
    work, lines = check_out(args.out), calibration_prompts(args)
    sampling = sampling_of(args)
    pipe = pipeline(args, sampling, bars)
    wanted = lines[: preset.prompts]
    with unfinished(work):
        trajectory = recorded(pipe, wanted, sampling, args.seed, preset.batch, work, bars)
        artifact = quantize(
            pipe, scheme, trajectory, preset=args.preset, device=sampling.device, seed=args.seed,
            temporal=args.temporal, work=work, on_progress=bars("Quantizing"),
        )  # fmt: skip
        (compact(artifact, pipe) if args.compact else artifact).save(args.out)
    bars.close()
    return Answer("\n".join(quantized_lines(args.out, artifact, pipe, len(wanted))))


def quantized_lines(out: Path, artifact: Artifact, pipe: Any, count: int) -> list[str]:
    """What was made: size, layers by scheme, and how they execute here."""
    before, size = resident_weight_bytes(denoiser_of(pipe)), out.stat().st_size
    with attach(pipe, artifact, route=False, execution="int8") as attached:
        execution = attached.execution()
    layers = facts_of(artifact, size)["layers_by_scheme"]
    return [
        f"{out}: {mib(size)}; the denoiser was {mib(before)} in memory.",
        f"Layers: {', '.join(f'{n} in {name}' for name, n in layers.items())}.",
        "Here they run as "
        + ", ".join(f"{how} ({n})" for how, n in execution["layers"].items())
        + ".",
        f"Calibrated on {count} prompts.",
    ]


def train_router(args: Namespace, bars: Bars) -> Answer:
    """`tenuto train-router`: train a cache router, and put it beside what the artifact holds."""
    from .route import PRESETS, train_router

    if args.preset not in PRESETS:
        raise TenutoError(f"Unknown preset {args.preset!r}: choose one of {', '.join(PRESETS)}.")
    check_model(args.model)
    work, lines = check_out(args.out), calibration_prompts(args)
    artifact = load_artifact(args.artifact) if args.artifact else None
    sampling = sampling_of(args, artifact)
    pipe = pipeline(args, sampling, bars, artifact)
    batch = PRESETS[args.preset].batch
    with unfinished(work):
        trajectory = recorded(pipe, lines, sampling, args.seed, batch, work, bars, runs=1)
        route = train_router(
            pipe, trajectory, reuse=args.reuse, speedup=args.speedup, artifact=artifact,
            preset=args.preset, iterations=args.iterations, seed=args.seed,
            work=work, on_progress=bars("Training the router"),
        )  # fmt: skip
        whole = route if artifact is None else artifact | route
        whole.save(args.out)
    bars.close()
    return Answer(about(str(args.out), whole, args.out.stat().st_size))


def generate(args: Namespace, bars: Bars) -> Answer:
    """`tenuto generate`: draw pictures of one prompt."""
    from .pictures import draw, grid, picture_name, save_png

    check_model(args.model)
    out = args.out or picture_name(args.prompt, args.seed)
    check_file(out)
    artifact = load_artifact(args.artifact) if args.artifact else None
    sampling = sampling_of(args, artifact)
    pipe = pipeline(args, sampling, bars, artifact)
    pipe.set_progress_bar_config(**bars.settings("Drawing"))
    start = time.perf_counter()
    with attached_to(pipe, artifact, args.execution):
        pictures = draw(
            pipe, args.prompt, negative=args.negative, steps=sampling.steps,
            guidance=sampling.guidance, seed=args.seed, count=args.batch,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    settings = {
        "model": args.model, "prompt": args.prompt, "negative": args.negative,
        "steps": sampling.steps, "guidance": sampling.guidance, "seed": args.seed,
        "batch": args.batch, "artifact": args.artifact and args.artifact.name,
    }  # fmt: skip
    save_png(grid(pictures), out, settings)
    count = "1 picture" if args.batch == 1 else f"{args.batch} pictures"
    return Answer(f"{out}: {count} of {sampling.steps} steps in {seconds:.1f} s.")


def compare(args: Namespace, bars: Bars) -> Answer:
    """`tenuto compare`: what an artifact costs and what it buys."""
    from .measure import compare

    check_model(args.model)
    lines = comparison_prompts(args)
    artifact = load_artifact(args.artifact)
    sampling = sampling_of(args, artifact)
    pipe = pipeline(args, sampling, bars, artifact)
    found = compare(
        pipe, artifact, lines, count=args.count, steps=sampling.steps,
        guidance=sampling.guidance, seed=args.seed, execution=args.execution,
        on_progress=bars("Comparing"),
    )  # fmt: skip
    bars.close()
    return Answer(str(found), found.to_json())


def inspect(args: Namespace, bars: Bars) -> Answer:
    """`tenuto inspect`: what is in an artifact, with `--plot` as a picture too."""
    from .pictures import save_png
    from .plots import plot

    if args.layer is not None and args.plot is None:
        raise TenutoError("--layer says whose ranges --plot draws: ask for --plot too.")
    out = None if args.plot is None else check_picture(args.plot, args.file)
    artifact = load_artifact(args.file)
    size = args.file.stat().st_size
    with damage_told(args.file):
        text, data = about(str(args.file), artifact, size), facts_of(artifact, size)
        if out is None:
            return Answer(text, data)
        picture = plot(artifact.header, artifact.tensors, args.file.name, args.layer)
    save_png(picture, out, {"artifact": args.file.name, "layer": args.layer})
    return Answer(f"{text}\n\nThe picture is in {out}.", data | {"plot": str(out)})


def demo(args: Namespace, bars: Bars) -> Answer:
    """`tenuto demo`: calibrate, draw with and without, measure, and show it on one sheet."""
    check_model(PREFIX + args.model)
    check_file(args.out / "demo.png")
    from .showcase import showcase

    silence(not bars.watched)
    return showcase(args.model, args.out, bars)


def app(args: Namespace, bars: Bars) -> Answer:
    """`tenuto app`: the app in a browser or a window, until it is closed."""
    from .launch import launch

    launch(args)
    return Answer("The app is closed.")


@contextmanager
def unfinished(work: Path) -> Iterator[None]:
    """Keep `work` while the job is not done, unless it was refused before it began."""
    try:
        yield
    except TenutoError:
        if not (work / MANIFEST).exists():
            Work(work / RECORDING, {}).discard()
            with suppress(OSError):
                work.rmdir()
        raise
    Work(work, {}).discard()


# --- models and recordings ------------------------------------------------------------------------


def sampling_of(args: Namespace, artifact: Artifact | None = None) -> Sampling:
    """Steps and guidance: as asked, else the artifact's, else the model's own."""
    steps, guidance = defaults(args.model)
    if artifact is not None:
        with damage_told(args.artifact):
            steps, guidance = Defaults.read(artifact.header["schedule"])
    return Sampling(
        steps if args.steps is None else args.steps,
        guidance if args.guidance is None else args.guidance,
        device_of(args.device),
    )


def pipeline(
    args: Namespace, sampling: Sampling, bars: Bars, artifact: Artifact | None = None
) -> Any:
    """The model, loaded and checked."""
    pipe = loaded(args.model, sampling.device, bars)
    check_steps(pipe, sampling.steps)
    if artifact is not None:
        with damage_told(args.artifact), attach(pipe, artifact):
            pass  # it fits
    return pipe


def loaded(model: str, device: torch.device, bars: Bars) -> Any:
    """A pipeline on `device`. A model of one's own is in bf16 on a GPU, all else in fp32."""
    wide = model.startswith(PREFIX) or device.type == "cpu"
    silence(not bars.watched)
    return load(model, device, torch.float32 if wide else torch.bfloat16)


def check_steps(pipe: Any, steps: int) -> None:
    """TenutoError unless the model can be sampled in so many steps."""
    most = getattr(pipe.scheduler.config, "num_train_timesteps", None)
    if most is not None and steps > most:
        raise TenutoError(f"This model samples in at most {most} steps, not {steps}.")


def silence(bars: bool) -> None:
    """Keep other libraries' chatter away while a model is loaded, and their `bars` where asked."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.set_verbosity_error()
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    if bars:
        of_diffusers.disable_progress_bar()


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
    """A recording of every prompt, or the one that an interrupted command left in `work`."""
    batch = min(batch, len(lines))
    runs = runs or -(-len(lines) // batch)
    encoder = getattr(pipe, "text_encoder", None)
    job = {
        "job": "record", "prompts": lines, "steps": sampling.steps, "guidance": sampling.guidance,
        "seed": seed, "batch": batch, "runs": runs, "device": str(sampling.device),
        "model": [fingerprint(m) for m in (denoiser_of(pipe), encoder) if m is not None],
    }  # fmt: skip
    shelf = Work(work / RECORDING, job)
    found = kept(shelf, pipe, lines, sampling.steps, sampling.guidance)
    if found is None:
        found = record(
            pipe, lines, steps=sampling.steps, guidance=sampling.guidance, seed=seed,
            batch=batch, runs=runs, on_progress=bars("Recording"),
        )  # fmt: skip
        keep(shelf, found)
    return found
