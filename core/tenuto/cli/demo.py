"""`tenuto demo`: what artifacts do to eight images, measured and on one sheet."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..artifact import Artifact, set_default
from ..artifact.summary import counted, mib, table
from ..calibration import effort, prompts_needed, quantize
from ..errors import TenutoError
from ..files import write_text
from ..measure import FIRST_SEED, FULL, Comparison, compare_all
from ..measure.sheet import Row, sheet
from ..numerics import schemes
from ..resources import asset
from ..sampling import record
from ..sampling.images import save_png, to_images
from ..sampling.loading import PREFIX, Defaults, defaults, demo, prompts
from .console import Answer, Bars

CAPTIONS = (
    "a goldfish",
    "a school bus",
    "a lemon",
    "a golden retriever",
    "a pizza",
    "a lighthouse",
    "a monarch butterfly",
    "a sports car",
)
BATCH = 4  # two batches, so that the variants take turns
MADE, HALF, SHIPPED = "w8a8", "w8a8-half", "w4a8-router"
NAMES = {
    FULL: "Full precision",
    MADE: "W8A8, calibrated just now",
    HALF: "W8A8, half of calls skipped",
    SHIPPED: "W4A8 + schedule, shipped",
}


def showcase(model: str, out: Path, bars: Bars) -> Answer:
    """Quantize a demo model, generate eight prompts with every variant, write sheet and numbers."""
    sampling = defaults(PREFIX + model)
    pipe = demo(model)
    bars.stages = ["Recording", "Quantizing", "Generating"]
    made = calibrated(pipe, sampling, bars)
    artifacts = {MADE: made, HALF: set_default(deepcopy(made), 2)}
    shipped = shipped_artifact(model)
    if shipped is not None:
        artifacts[SHIPPED] = shipped
    found, generated = compare_all(
        pipe, artifacts, CAPTIONS, count=len(CAPTIONS), steps=sampling.steps,
        guidance=sampling.guidance, batch=BATCH, on_progress=bars("Generating"),
    )  # fmt: skip
    variants = {FULL: unchanged(found[MADE])} | found
    rows = [
        Row(NAMES[name], row_lines(name, variant), to_images(torch.cat(generated[name].batches)))
        for name, variant in variants.items()
    ]
    title = f"{PREFIX}{model}: {conditions(found[MADE])}"
    data = {
        "model": PREFIX + model,
        "prompts": list(CAPTIONS),
        "absent": [] if shipped is not None else [SHIPPED],
        "variants": {name: variant.to_json() for name, variant in variants.items()},
    }
    bars.close()
    settings = {"model": PREFIX + model, "prompts": list(CAPTIONS), "seed": FIRST_SEED}
    save_png(sheet(title, rows, CAPTIONS), out / "demo.png", settings)
    write_text(out / "demo.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    own = "tenuto quantize MODEL --scheme w8a8 --out quantized.safetensors"
    return Answer(summary(variants, shipped is None, out), data, next=own)


def calibrated(pipe: Any, sampling: Defaults, bars: Bars) -> Artifact:
    """A quick W8A8 artifact."""
    preset = effort("quick")
    lines = prompts("default")[: prompts_needed(schemes.W8A8, preset)]
    trajectory = record(
        pipe, lines, steps=sampling.steps, batch=preset.batch, guidance=sampling.guidance,
        on_progress=bars("Recording"),
    )  # fmt: skip
    notes = bars("Quantizing")  # the forecast is measured below, beside the other rows
    return quantize(pipe, schemes.W8A8, trajectory, measure=False, on_progress=notes)


def shipped_artifact(model: str) -> Artifact | None:
    """The artifact that ships with a demo model, or None where none does."""
    try:
        path = asset(f"artifacts/demo-{model}.{SHIPPED}.safetensors")
    except TenutoError:
        return None
    return Artifact.load(path)


def unchanged(other: Comparison) -> Comparison:
    """Full precision beside itself, from what was measured in the same run as `other`."""
    seconds, weights = other.seconds_per_picture["float"], other.resident_weight_bytes["float"]
    return replace(
        other,
        psnr_db={"median": float("inf"), "p5": float("inf")},
        ssim=1.0,
        lpips=0.0,
        identical_pictures=other.count,
        reuse_ratio=0.0,
        reuse_flops=0.0,
        int8_weight_share=0.0,
        seconds_per_picture=other.seconds_per_picture | {"artifact": seconds},
        speedup=1.0,
        speedup_quartiles=None,
        resident_weight_bytes={"float": weights, "artifact": weights},
        peak_memory_bytes=None,
        peak_memory_source="",
        execution={"mode": "float", "layers": {}},
    )


def conditions(found: Comparison) -> str:
    """Under what the images were generated."""
    guidance = "" if found.guidance is None else f", guidance {found.guidance:g}"
    place = f"{found.device}, {counted(found.threads, 'thread')}"
    return f"{found.steps} steps{guidance}, equal seeds, {place}"


def row_lines(name: str, found: Comparison) -> list[str]:
    """What stands beside a row of the sheet; nothing in it is estimated."""
    seconds, weights = found.seconds_per_picture["artifact"], found.resident_weight_bytes
    lines = [f"{seconds:.2f} s an image", f"{mib(weights['artifact'])} of weights in memory"]
    floor = found.bf16_floor_psnr_db
    if name == FULL:
        half = found.seconds_per_picture.get("bf16")
        if floor is None or half is None:
            return lines
        return [*lines, f"in bf16: {half:.2f} s, PSNR {floor['median']:.1f} dB"]
    gain = f"{found.speedup or 0:.2f} times as fast as {found.dtype}"
    lines.insert(1, "simulated, no gain" if found.speedup is None else gain)
    near = [f"PSNR {found.psnr_db['median']:.1f} dB"]
    near += [] if found.lpips is None else [f"LPIPS {found.lpips:.4f}"]
    reused = found.reuse_ratio or 0
    done = "calls skipped" if found.whole_calls else "branch calls reused"
    how = found.execution["mode"] + (f", {reused:.0%} of {done}" if reused else "")
    return [", ".join(near), *lines, how]


def summary(variants: dict[str, Comparison], absent: bool, out: Path) -> str:
    """The rows as text, and where the files are."""
    rows = [(NAMES[name], "; ".join(row_lines(name, found))) for name, found in variants.items()]
    if absent:
        rows.append((NAMES[SHIPPED], "not here: no such artifact came with this installation"))
    rows += [("Images", str(out / "demo.png")), ("Numbers", str(out / "demo.json"))]
    return "\n".join(table(rows))
