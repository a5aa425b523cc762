"""What the commands of `tenuto` do. Everything that can be checked is, before a model is loaded."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..artifact.summary import about, facts_of, mib
from ..calibration import Preset, effort
from ..errors import TenutoError
from ..measure import resident_weight_bytes
from ..model import denoiser_of
from ..numerics import Scheme, named
from ..runtime import attach
from ..sampling.loading import PREFIX, check_model
from .checks import (
    calibration_prompts,
    check_file,
    check_out,
    check_picture,
    comparison_prompts,
    damage_told,
    load_artifact,
)
from .console import Answer, Bars
from .session import attached_to, pipeline, recorded, sampling_of, silence, unfinished

ENCODERS = "encoders"  # the folder of the text encoders inside the work folder


def quantize(args: Namespace, bars: Bars) -> Answer:
    """`tenuto quantize`: record, quantize, save."""
    from ..artifact import compact
    from ..calibration import quantize, quantize_encoder

    encoder, method = args.text_encoder, args.method or "gptq"
    if args.scheme is None and encoder is None:
        raise TenutoError("Say what to quantize: --scheme, --text-encoder or both.")
    scheme, preset = check_quantization(args)
    check_model(args.model)
    work, lines = check_out(args.out), calibration_prompts(args)
    sampling = sampling_of(args)
    pipe = pipeline(args, sampling, bars)
    wanted, made = lines[: preset.prompts], []
    with unfinished(work):
        if scheme is not None:
            trajectory = recorded(pipe, wanted, sampling, args.seed, preset.batch, work, bars)
            artifact = quantize(
                pipe, scheme, trajectory, preset=args.preset, device=sampling.device,
                seed=args.seed, rounding=args.rounding, temporal=args.temporal, work=work,
                on_progress=bars("Quantizing"),
            )  # fmt: skip
            made.append(compact(artifact, pipe) if args.compact else artifact)
        if encoder is not None:
            apart = work if scheme is None else work / ENCODERS
            made.append(quantize_encoder(
                pipe, encoder, lines, method=method, seed=args.seed, steps=sampling.steps,
                guidance=sampling.guidance, device=sampling.device, work=apart,
                on_progress=bars("Text encoders"),
            ))  # fmt: skip
        whole = made[0] if len(made) == 1 else made[0] | made[1]
        whole.save(args.out)
    bars.close()
    count = len(lines) if scheme is None else len(wanted)
    return Answer("\n".join(quantized_lines(args.out, whole, pipe, count)))


def check_quantization(args: Namespace) -> tuple[Scheme | None, Preset]:
    """The scheme, if any, and the preset; TenutoError where what is chosen does not fit them."""
    from ..calibration import encoder_scheme
    from ..calibration.temporal.maintenance import check_choice

    if args.method is not None and args.text_encoder is None:
        raise TenutoError("--method says how text encoders are rounded: give --text-encoder too.")
    if args.text_encoder is not None:
        encoder_scheme(args.text_encoder, args.method or "gptq")
    scheme, preset = args.scheme and named(args.scheme), effort(args.preset)
    preset.rounding(args.rounding)
    if args.rounding is not None and (scheme is None or scheme.weight.bits == 8):
        raise TenutoError("Only weights below 8 bits can round otherwise: take w4a8 or w4a16.")
    check_choice(args.temporal)
    return scheme, preset


def quantized_lines(out: Path, artifact: Artifact, pipe: Any, count: int) -> list[str]:
    """What was made: size, layers by scheme, and how they execute here."""
    before, size = resident_weight_bytes(denoiser_of(pipe)), out.stat().st_size
    with attach(pipe, artifact, route=False, execution="int8") as attached:
        execution, encoders = attached.execution(), attached.encoders()
    layers = facts_of(artifact, size)["layers_by_scheme"]
    found = [f"{out}: {mib(size)}; the denoiser was {mib(before)} in memory."]
    if layers:
        how = ", ".join(f"{how} ({n})" for how, n in execution["layers"].items())
        found.append(f"Layers: {', '.join(f'{n} in {name}' for name, n in layers.items())}.")
        found.append(f"Here they run as {how}.")
    found += [f"{name}: {n} layers, weights alone." for name, n in encoders.items()]
    return [*found, f"Calibrated on {count} prompts."]


def train_router(args: Namespace, bars: Bars) -> Answer:
    """`tenuto train-router`: train a cache router, and put it beside what the artifact holds."""
    from ..calibration import PRESETS, train_router

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
    from ..measure.sheet import grid
    from ..sampling.images import draw, picture_name, save_png

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
    from ..measure import compare

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
    """`tenuto inspect`: what is in an artifact, with `--plot` as a plot too."""
    from ..artifact.plots import plot
    from ..sampling.images import save_png

    if args.layer is not None and args.plot is None:
        raise TenutoError("--layer says whose ranges --plot shows: ask for --plot too.")
    out = None if args.plot is None else check_picture(args.plot, args.file)
    artifact = load_artifact(args.file)
    size = args.file.stat().st_size
    with damage_told(args.file):
        text, data = about(str(args.file), artifact, size), facts_of(artifact, size)
        if out is None:
            return Answer(text, data)
        picture = plot(artifact.header, artifact.tensors, args.file.name, args.layer)
    save_png(picture, out, {"artifact": args.file.name, "layer": args.layer})
    return Answer(f"{text}\n\nThe plot is in {out}.", data | {"plot": str(out)})


def demo(args: Namespace, bars: Bars) -> Answer:
    """`tenuto demo`: calibrate, draw with and without, measure, and show it on one sheet."""
    check_model(PREFIX + args.model)
    check_file(args.out / "demo.png")
    from .demo import showcase

    silence(not bars.watched)
    return showcase(args.model, args.out, bars)


def app(args: Namespace, bars: Bars) -> Answer:
    """`tenuto app`: the app in a browser or a window, until it is closed."""
    from .app import launch

    launch(args)
    return Answer("The app is closed.")
