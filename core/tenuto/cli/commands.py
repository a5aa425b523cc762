"""What the commands of `tenuto` do, as functions: `quantize(model, out=..., scheme="w8a8")`.

Each takes what the command line takes, under the same names and with the same defaults, and
returns an `Answer`; TenutoError says what is wrong. Everything that can be checked is, before a
model is loaded. `bars` shows progress, nothing where it is left out.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..artifact import Artifact
from ..artifact.summary import about, counted, facts_of, mib
from ..errors import TenutoError
from ..measure import FIRST_SEED, resident_weight_bytes
from ..model import denoiser_of
from ..runtime import attach
from ..sampling import described, one_by_one
from ..sampling.loading import PREFIX, check_model, on_disk
from .app import app
from .checks import (
    calibration_prompts,
    check_file,
    check_out,
    check_picture,
    check_quantization,
    comparison_prompts,
    damage_told,
    load_artifact,
)
from .console import Answer, Bars
from .session import attached_to, pipeline, recorded, sampling_of, silence, work_kept_until_done

__all__ = ["app", "compare", "demo", "generate", "inspect", "quantize", "train_router"]

ENCODERS = "encoders"  # the folder of the text encoders inside the work folder


def quantize(
    model: str,
    *,
    out: Path,
    scheme: str | None = None,
    text_encoder: str | None = None,
    method: str | None = None,
    temporal: str = "auto",
    rounding: str | None = None,
    preset: str = "quick",
    prompts: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    low_memory: bool | None = None,
    compact: bool = False,
    bars: Bars | None = None,
) -> Answer:
    """Quantize the denoiser, its text encoders or both, and write one artifact; it resumes."""
    from ..artifact import compact as compacted
    from ..calibration import prompts_needed, quantize, quantize_encoder

    bars = bars or Bars()
    if scheme is None and text_encoder is None:
        raise TenutoError("Say what to quantize: --scheme, --text-encoder or both.")
    wanted, effort = check_quantization(
        scheme, preset, text_encoder=text_encoder, method=method, rounding=rounding,
        temporal=temporal,
    )  # fmt: skip
    check_model(model)
    work, lines = check_out(out), calibration_prompts(model, prompts)
    sampling = sampling_of(model, steps=steps, guidance=guidance, device=device, call=call)
    pipe = pipeline(model, sampling, bars, low_memory=low_memory, encoders=text_encoder is None)
    used = lines if wanted is None else lines[: prompts_needed(wanted, effort, rounding)]
    made = list[Artifact]()
    with work_kept_until_done(work):
        if wanted is not None:
            trajectory = recorded(pipe, used, sampling, seed, effort.batch, work, bars)
            artifact = quantize(
                pipe, wanted, trajectory, preset=preset, device=sampling.device, seed=seed,
                rounding=rounding, temporal=temporal, work=work, on_progress=bars("Quantizing"),
            )  # fmt: skip
            made.append(compacted(artifact, pipe) if compact else artifact)
        if text_encoder is not None:
            apart = work if wanted is None else work / ENCODERS
            made.append(quantize_encoder(
                pipe, text_encoder, lines, method=method or "gptq", seed=seed,
                steps=sampling.steps, guidance=sampling.guidance, call=sampling.called(pipe),
                device=sampling.device, work=apart, on_progress=bars("Text encoders"),
            ))  # fmt: skip
        whole = made[0] if len(made) == 1 else made[0] | made[1]
        whole.save(out)
    bars.close()
    text = "\n".join(quantized_lines(out, whole, pipe, len(used)))
    return Answer(text, next=compare_line(model, out))


def quantized_lines(out: Path, artifact: Artifact, pipe: Any, count: int) -> list[str]:
    """What was made: size, layers by scheme, and how they execute here."""
    before, size = resident_weight_bytes(denoiser_of(pipe)), out.stat().st_size
    where, execution, encoders = "would be" if on_disk(pipe) else "was", {}, {}
    if not on_disk(pipe):
        with attach(pipe, artifact, route=False, execution="int8") as attached:
            execution, encoders = attached.execution()["layers"], attached.encoders()
    layers = facts_of(artifact, size)["layers_by_scheme"]
    found = [f"{out}: {mib(size)}; the denoiser {where} {mib(before)} in memory."]
    if layers:
        found.append(f"Layers: {', '.join(f'{n} in {name}' for name, n in layers.items())}.")
    if execution:
        how = ", ".join(f"{how} ({n})" for how, n in execution.items())
        found.append(f"Here they run as {how}.")
    found += [f"{name}: {counted(n, 'layer')}, weights alone." for name, n in encoders.items()]
    return [*found, f"Calibrated on {counted(count, 'prompt')}."]


def compare_line(model: str, artifact: Path) -> str:
    """The command that measures what was just made."""
    return f"tenuto compare {shlex.quote(model)} --artifact {shlex.quote(str(artifact))}"


def train_router(
    model: str,
    *,
    out: Path,
    artifact: Path | None = None,
    speedup: float | None = None,
    reuse: float | None = None,
    preset: str = "quick",
    iterations: int | None = None,
    prompts: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Train a cache router and write it, beside what `artifact` contains, to `out`; it resumes."""
    from ..calibration import PRESETS, train_router

    bars = bars or Bars()
    if speedup is not None and reuse is not None:
        raise TenutoError("Give --speedup or --reuse, not both: each follows from the other.")
    if preset not in PRESETS:
        raise TenutoError(f"Unknown preset {preset!r}: choose one of {', '.join(PRESETS)}.")
    check_model(model)
    work, lines = check_out(out), calibration_prompts(model, prompts)
    base = load_artifact(artifact) if artifact else None
    sampling = sampling_of(
        model, steps=steps, guidance=guidance, device=device, artifact=base, file=artifact,
        call=call,
    )  # fmt: skip
    pipe = pipeline(model, sampling, bars, base, artifact)
    with work_kept_until_done(work):
        batch = PRESETS[preset].batch
        trajectory = recorded(pipe, lines, sampling, seed, batch, work, bars, runs=1)
        router = train_router(
            pipe, trajectory, reuse=reuse, speedup=speedup, artifact=base, preset=preset,
            iterations=iterations, seed=seed, work=work, on_progress=bars("Training the router"),
        )  # fmt: skip
        whole = router if base is None else base | router
        whole.save(out)
    bars.close()
    return Answer(about(str(out), whole, out.stat().st_size), next=compare_line(model, out))


def generate(
    model: str,
    *,
    prompt: str,
    negative: str | None = None,
    artifact: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    execution: str = "auto",
    batch: int = 1,
    out: Path | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Generate `batch` images of one prompt, with an artifact or without, as one PNG."""
    from ..measure.sheet import grid
    from ..sampling.images import generate_images, image_name, save_png

    bars = bars or Bars()
    check_model(model)
    out = out or image_name(prompt, seed)
    check_file(out)
    found = load_artifact(artifact) if artifact else None
    sampling = sampling_of(
        model, steps=steps, guidance=guidance, device=device, artifact=found, file=artifact,
        call=call,
    )  # fmt: skip
    pipe = pipeline(model, sampling, bars, found, artifact)
    pipe.set_progress_bar_config(**bars.settings("Generating"))
    start = time.perf_counter()
    with attached_to(pipe, found, execution):
        images = generate_images(
            pipe, prompt, negative=negative, steps=sampling.steps, guidance=sampling.guidance,
            seed=seed, count=batch, call=sampling.called(pipe),
        )  # fmt: skip
    seconds = time.perf_counter() - start
    settings = {
        "model": model, "prompt": prompt, "negative": negative, "steps": sampling.steps,
        "guidance": sampling.guidance, "seed": seed, "batch": batch,
        "artifact": artifact and artifact.name,
    } | ({"call": described(sampling.call)} if sampling.call else {})  # fmt: skip
    save_png(grid(images), out, settings)
    quoted = shlex.quote(model)
    what = f"tenuto quantize {quoted} --scheme w8a8 --out quantized.safetensors"
    size = f"{counted(batch, 'image')} of {counted(sampling.steps, 'step')}"
    return Answer(
        f"{out}: {size} in {seconds:.1f} s.",
        next=what if artifact is None else compare_line(model, artifact),
    )


def compare(
    model: str,
    *,
    artifact: Path,
    prompts: Path | None = None,
    count: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = FIRST_SEED,
    device: str | None = None,
    execution: str = "int8",
    bars: Bars | None = None,
) -> Answer:
    """Measure time, memory and the distance from full precision at equal seeds."""
    from ..measure import compare

    bars = bars or Bars()
    check_model(model)
    lines = comparison_prompts(model, prompts, count)
    found = load_artifact(artifact)
    sampling = sampling_of(
        model, steps=steps, guidance=guidance, device=device, artifact=found, file=artifact,
        call=call,
    )  # fmt: skip
    pipe = pipeline(model, sampling, bars, found, artifact)
    given = sampling.called(pipe)
    measured = compare(
        pipe, found, lines, count=count, steps=sampling.steps, guidance=sampling.guidance,
        call=given, batch=1 if one_by_one(pipe, given) else 8, seed=seed, execution=execution,
        on_progress=bars("Comparing"),
    )  # fmt: skip
    bars.close()
    use = f"tenuto generate {shlex.quote(model)} --artifact {shlex.quote(str(artifact))}"
    return Answer(str(measured), measured.to_json(), next=f"{use} --prompt TEXT")


def inspect(
    file: Path,
    *,
    plot: Path | Literal[True] | None = None,
    layer: str | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Show what is in an artifact; `plot` (True: beside it) is a PNG of what it says by step."""
    from ..artifact.plots import plot as plotted
    from ..sampling.images import save_png

    if layer is not None and plot is None:
        raise TenutoError("--layer says whose ranges --plot shows: ask for --plot too.")
    out = None if plot is None else check_picture(plot, file)
    artifact = load_artifact(file)
    size = file.stat().st_size
    with damage_told(file):
        text, data = about(str(file), artifact, size), facts_of(artifact, size)
        if out is None:
            return Answer(text, data, next=f"tenuto inspect {shlex.quote(str(file))} --plot")
        image = plotted(artifact.header, artifact.tensors, file.name, layer)
    save_png(image, out, {"artifact": file.name, "layer": layer})
    text, data = f"{text}\n\nThe plot is in {out}.", data | {"plot": str(out)}
    return Answer(text, data, next=f"tenuto compare MODEL --artifact {shlex.quote(str(file))}")


def demo(
    *,
    model: str = "transformer",
    out: Path = Path("tenuto-demo"),
    bars: Bars | None = None,
) -> Answer:
    """Calibrate a model that ships, generate with and without, measure, and show one sheet."""
    bars = bars or Bars()
    check_model(PREFIX + model)
    check_file(out / "demo.png")
    from .demo import showcase

    silence(bars.watched)
    return showcase(model, out, bars)
