"""`tenuto generate`: images of one prompt, with an artifact or without."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact.summary import counted
from ..caching import Speedup
from ..sampling import described
from .answers import compare_line, quantize_line, skipped_line
from .checks import check_image, how_called, load_artifact
from .console import Answer, Bars
from .model_source import model_source
from .prompt_states import Asked, PromptStates
from .session import attached_to, sampling_of


def generate(
    model: str,
    *,
    prompt: str,
    negative: str | None = None,
    artifact: Path | None = None,
    speedup: Speedup | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    execution: str = "auto",
    compile: bool = False,
    graphs: bool | None = None,
    prompt_cache: Path | None = None,
    batch: int = 1,
    out: Path | None = None,
    config: str | None = None,
    lora: Sequence[str] = (),
    bars: Bars | None = None,
) -> Answer:
    """Generate `batch` images of one prompt, with an artifact or without, as one PNG."""
    from ..measure.sheet import grid
    from ..sampling.images import image_name, save_png

    bars = bars or Bars()
    source = model_source(model, config, bars, lora)
    how = how_called(compile, graphs, artifact is not None or speedup is not None)
    out = out or image_name(prompt, seed)
    check_image(out)
    found = load_artifact(artifact) if artifact else None
    states = PromptStates(prompt_cache, source.loras)
    sampling = sampling_of(
        source.place, steps=steps, guidance=guidance, device=device, artifact=found, file=artifact,
        call=call,
    )  # fmt: skip
    asked = Asked(prompt, negative, seed, batch, sampling)
    pipe = states.pipeline(source.place, asked, bars, found, artifact)
    pipe.set_progress_bar_config(**bars.settings("Generating"))
    start = time.perf_counter()
    with states.used_by(pipe), attached_to(pipe, found, execution, speedup, **how) as attached:
        images = asked.images(pipe)
        seconds, skipped = time.perf_counter() - start, skipped_line(attached)
    settings = {
        "model": model, "prompt": prompt, "negative": negative, "steps": sampling.steps,
        "guidance": sampling.guidance, "seed": seed, "batch": batch,
        "artifact": artifact and artifact.name, "speedup": speedup,
    } | ({"call": described(sampling.call)} if sampling.call else {})  # fmt: skip
    settings |= {"lora": [*lora]} if lora else {}
    save_png(grid(images), out, settings)
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "device": device}
    like = dict(call or {}) | ({"negative_prompt": negative} if negative else {})
    size = f"{counted(batch, 'image')} of {counted(sampling.steps, 'step')}"
    return Answer(
        "\n".join([f"{out}: {size} in {seconds:.1f} s.", *skipped, *states.lines()]),
        next=quantize_line(source.line, like, **given)
        if artifact is None
        else compare_line(source.with_loras, artifact, like, speedup=speedup, **given),
    )
