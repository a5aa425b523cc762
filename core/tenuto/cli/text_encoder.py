"""`tenuto text-encoder`: a text encoder as one quantized file that ComfyUI reads by itself."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..artifact.export.report import Report
from ..artifact.summary import counted, mib
from ..errors import TenutoError
from ..sampling.libraries import silence
from .checks import check_kept, check_out, device_of, read_prompts
from .console import Answer, Bars

SHOWN = 4  # states that are printed one by one


def text_encoder(
    model: str,
    *,
    consumer: str,
    scheme: str,
    out: Path,
    method: str = "gptq",
    embeddings: str = "bf16",
    prompts: Path | None = None,
    config: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    max_memory: int | None = None,
    bars: Bars | None = None,
) -> Answer:
    """Write a quantized text encoder for ComfyUI and say how far its states are off; it resumes."""
    from ..calibration import check_text_encoder, quantize_text_encoder
    from .session import work_kept_until_done

    bars = bars or Bars()
    check_text_encoder(scheme, method, consumer, embeddings)
    if out.suffix.lower() != ".safetensors":
        raise TenutoError(f"The file is one that ends in .safetensors, and {out.name} is none.")
    work, lines = check_out(out), [] if prompts is None else read_prompts(prompts)
    check_kept(out, model)
    silence(bars.watched)
    with work_kept_until_done(work, out):
        report = quantize_text_encoder(
            model, out, scheme=scheme, consumer=consumer, method=method, embeddings=embeddings,
            prompts=lines, config=config, seed=seed, device=device_of(device),
            max_memory=max_memory, work=work, on_progress=bars("Quantizing"),
        )  # fmt: skip
    bars.close()
    where = f"put {shlex.quote(str(out))} into ComfyUI's models/text_encoders; Load CLIP has it."
    known = report.facts["known_as"] is not None
    return Answer("\n".join(lines_of(report)), report.to_json(), next=where if known else "")


def lines_of(report: Report) -> list[str]:
    """A report as people read it."""
    facts = report.facts
    kinds = ", ".join(f"{counted(n, 'layer')} in {kind}" for kind, n in report.kinds.items())
    found = [
        f"{report.files[0]}: {mib(report.after)}; in bf16 it would be {mib(report.before)}.",
        f"{kinds}, by {facts['method']} on {facts['prompts']} prompts as {facts['consumer']} "
        "gives them; all else in 16 bits.",
        *state_lines(facts["states"]),
        f"Each layer was read back. Read by: {report.host}.",
    ]
    found += [f"Left out: {line}" for line in report.dropped]
    return found + [f"Note: {line}" for line in report.notes]


def state_lines(states: list[dict[str, Any]]) -> list[str]:
    """How far each state is off that the denoiser reads; of many, the farthest ones."""
    some = sorted(states, key=lambda s: -s["quantized"]["relative_l2"])[:SHOWN]
    others = len(states) - len(some)
    said = f" (the farthest of {len(states)})" if others else ""
    found = [f"States that the denoiser reads, on prompts that were not calibrated on{said}:"]
    for state in sorted(some, key=lambda s: states.index(s)):
        one, other = state["quantized"], state["nearest"]
        name = "the last one" if state["state"] == "last" else f"number {state['state']}"
        found.append(
            f"  {name}: cosine {one['cosine']:.5f} (least {one['least']:.4f}), relative error "
            f"{one['relative_l2']:.4f}; rounded to nearest {other['cosine']:.5f} "
            f"({other['least']:.4f}), {other['relative_l2']:.4f}."
        )
    return found
