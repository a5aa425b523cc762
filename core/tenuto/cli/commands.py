"""What the commands of `tenuto` do, as functions: `quantize(model, out=..., scheme="w8a8")`.

Each takes what the command line takes, under the same names and with the same defaults, and
returns an `Answer`; TenutoError says what is wrong. Everything that can be checked is, before a
model is loaded. `bars` shows progress, nothing where it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import calibration
from ..artifact import Artifact, set_default
from ..artifact import compact as compacted
from ..artifact.summary import about
from ..caching import Speedup
from ..calibration import prompts_needed
from ..errors import TenutoError
from ..measure import FIRST_SEED
from ..sampling import one_by_one, wanted_prompts
from ..sampling.libraries import silence
from ..sampling.loading import PREFIX, check_model
from ..sampling.loras import add_loras
from .answers import compare_line, quantized_lines
from .app import app
from .calls import given_again, images_in
from .check import check
from .checks import (
    calibration_prompts,
    check_file,
    check_image,
    check_kernel,
    check_out,
    check_quantization,
    check_wanted,
    comparison_prompts,
    how_called,
    load_artifact,
)
from .console import Answer, Bars
from .export import export
from .generate import generate
from .inspect import inspect
from .model_source import model_source
from .session import (
    low_encoders,
    pipeline,
    recorded,
    sampling_of,
    work_kept_until_done,
    written,
)
from .text_encoder import text_encoder

__all__ = [
    "app", "check", "compare", "demo", "export", "generate", "inspect", "quantize", "text_encoder",
    "train_router",
]  # fmt: skip

ENCODERS = "encoders"  # the folder of the text encoders inside the work folder


def quantize(
    model: str,
    *,
    out: Path,
    scheme: str | None = None,
    text_encoder: str | None = None,
    method: str | None = None,
    temporal: str = "auto",
    table_budget: float | None = None,
    rounding: str | None = None,
    preset: str = "quick",
    prompts: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    low_memory: bool | None = None,
    max_memory: int | None = None,
    compact: bool = False,
    speedup: Speedup | None = None,
    reuse: float | None = None,
    under_cache: bool = False,
    measure: bool | None = None,
    config: str | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Quantize the denoiser, its text encoders or both, and write one artifact; it resumes."""
    bars = bars or Bars()
    rest: dict[str, Any] = {"text_encoder": text_encoder, "method": method, "rounding": rounding}
    rest |= {"temporal": temporal, "table_budget": table_budget, "under_cache": under_cache}
    wanted, effort = check_quantization(scheme, preset, **rest)
    default, under = check_wanted(scheme, text_encoder, speedup, reuse, under_cache)
    source = model_source(model, config, bars, out=out)
    work, lines, made = check_out(out), calibration_prompts(model, prompts), list[Artifact]()
    sampling = sampling_of(source.place, steps=steps, guidance=guidance, device=device, call=call)
    used = lines if wanted is None else lines[: prompts_needed(wanted, effort, rounding)]
    pipe = pipeline(
        source.place, sampling, bars, use="quantize", scheme=wanted, encoder=text_encoder,
        effort={"preset": preset, "rounding": rounding, "prompts": used}, max_memory=max_memory,
        low_memory=low_memory, encoders=text_encoder is None,
    )  # fmt: skip
    with work_kept_until_done(work, out):
        if wanted is not None:
            known = recorded(pipe, used, sampling, seed, effort.batch, work, bars)
            artifact = calibration.quantize(
                pipe, wanted, check_kernel(default, known), preset=preset, seed=seed,
                rounding=rounding, temporal=temporal, table_budget=table_budget, measure=measure,
                max_memory=max_memory, under=under, device=sampling.device, work=work,
                on_progress=bars("Quantizing"),
            )  # fmt: skip
            set_default(artifact, default)
            made.append(compacted(artifact, pipe) if compact else artifact)
        if text_encoder is not None:
            given = pipe, text_encoder, lines, sampling, method, seed
            made.append(low_encoders(*given, work / ENCODERS if made else work, bars, max_memory))
        whole = written(made, out)
    bars.close()
    said = "\n".join(quantized_lines(out, whole, pipe, len(used)))
    return Answer(said, next=compare_line(source.line, out, images_in(call), device=device))


def train_router(
    model: str,
    *,
    out: Path,
    artifact: Path | None = None,
    speedup: float | None = None,
    reuse: float | None = None,
    whole: bool = False,
    policy: str | None = None,
    weighting: str | None = None,
    preset: str = "quick",
    iterations: int | None = None,
    prompts: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    config: str | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Train a cache router and write it, beside what `artifact` contains, to `out`; it resumes."""
    from ..caching import table_policy
    from ..calibration import PRESETS, train_router

    bars = bars or Bars()
    if policy is not None:
        table_policy(policy)  # one sentence before anything is loaded
    if speedup is not None and reuse is not None:
        raise TenutoError("Give --speedup or --reuse, not both: each follows from the other.")
    if preset not in PRESETS:
        raise TenutoError(f"Unknown preset {preset!r}: choose one of {', '.join(PRESETS)}.")
    source = model_source(model, config, bars, out=out)
    work, lines = check_out(out), calibration_prompts(model, prompts)
    base = load_artifact(artifact) if artifact else None
    sampling = sampling_of(
        source.place, steps=steps, guidance=guidance, device=device, artifact=base, file=artifact,
        call=call,
    )  # fmt: skip
    pipe = pipeline(source.place, sampling, bars, base, artifact, use="train-router")
    with work_kept_until_done(work, out):
        batch = PRESETS[preset].batch
        trajectory = recorded(pipe, lines, sampling, seed, batch, work, bars, runs=1)
        router = train_router(
            pipe, trajectory, reuse=reuse, speedup=speedup, artifact=base, preset=preset,
            iterations=iterations, seed=seed, whole=whole, policy=policy, weighting=weighting,
            work=work, on_progress=bars("Training the router"),
        )  # fmt: skip
        made = router if base is None else base | router
        made.save(out)
    bars.close()
    line = compare_line(source.line, out, images_in(call), device=device)
    return Answer(about(str(out), made, out.stat().st_size), next=line)


def compare(
    model: str,
    *,
    artifact: Path | None = None,
    speedup: Speedup | None = None,
    prompts: Path | None = None,
    count: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = FIRST_SEED,
    device: str | None = None,
    execution: str = "int8",
    compile: bool = False,
    graphs: bool | None = None,
    config: str | None = None,
    lora: Sequence[str] = (),
    sheet: Path | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Measure time, memory and the distance from full precision at equal seeds."""
    from ..measure import ARTIFACT, compare_all

    bars = bars or Bars()
    if sheet is not None:
        check_image(sheet)
    source = model_source(model, config, bars, lora)
    if artifact is None and speedup is None:
        raise TenutoError("Say what to compare: --artifact, --speedup or both.")
    lines = comparison_prompts(model, prompts, count)
    found = load_artifact(artifact) if artifact else None
    sampling = sampling_of(
        source.place, steps=steps, guidance=guidance, device=device, artifact=found, file=artifact,
        call=call,
    )  # fmt: skip
    pipe = pipeline(source.place, sampling, bars, found, artifact, use="compare")
    add_loras(pipe, source.loras)
    given = sampling.called(pipe)
    compared, generated = compare_all(
        pipe, {ARTIFACT: found}, lines, count=count, steps=sampling.steps, call=given, seed=seed,
        guidance=sampling.guidance, batch=1 if one_by_one(pipe, given) else 8, execution=execution,
        speedup=speedup, on_progress=bars("Comparing"), **how_called(compile, graphs),
    )  # fmt: skip
    bars.close()
    measured, more = compared[ARTIFACT], ""
    if sheet is not None:
        from .side_by_side import save_sheet

        changed = "With the artifact" if artifact else "With skipped calls"
        shown = measured, generated, wanted_prompts(pipe, lines, given)
        save_sheet(sheet, Path(model).name or model, changed, *shown, seed)
        more = f"\nImages: {sheet}"
    like = given_again(
        call, artifact=artifact, speedup=speedup, steps=steps, guidance=guidance, device=device,
        compile=compile, graphs=graphs,
    )  # fmt: skip
    use = f"tenuto generate {source.with_loras}{like} --prompt TEXT"
    return Answer(f"{measured}{more}", measured.to_json(), next=use)


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
