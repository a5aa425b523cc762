"""Every scheme against the full-precision picture, side by side.

    python benchmarks/quantization.py [--model demo:transformer] [--count 64] [--preset standard]
    python benchmarks/quantization.py --artifact a.safetensors --rows "W8A8*" "*nearest*"

Prints one JSON line a row as it goes and a Markdown table at the end. Rows: the bf16 floor, W8A8
and fp8 with ranges per token and per step, weight-only, and W4A8 by GPTQ, by AdaRound, by AdaRound
that goes on from GPTQ and by round-to-nearest with the same layers kept at 8 bits, and with
everything at 4 bits. The time-only modules become tables in all of them (`--temporal` says
otherwise).
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.calibration import effort, recipe_for
from tenuto.calibration.algorithms.adaround import AdaRound
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.measure import bf16_arithmetic, bf16_copy, lpips, psnr, ssim
from tenuto.model import denoiser_of, device_and_dtype
from tenuto.runtime import percentile
from tenuto.sampling import Trajectory, sampler
from tenuto.sampling.loading import defaults, load, prompts

FIRST_SEED = 10_000


def recipes(model: nn.Module, preset: str) -> Iterator[tuple[str, tn.Recipe]]:
    """(name, recipe) of every row."""
    backbone, s = tn.describe(model), tn.schemes
    nearest, compensated = RoundToNearest(), effort(preset).rounding("gptq")
    learnt, both = AdaRound(300, 16), AdaRound(300, 16, start="gptq")
    yield "W8A8, per token", recipe_for(s.W8A8, backbone)
    yield "W8A8, per step", recipe_for(s.W8A8_STATIC, backbone)
    yield "fp8, per token", recipe_for(s.FP8, backbone)
    yield "fp8, per step", recipe_for(s.FP8_STATIC, backbone)
    yield "W8A16", recipe_for(s.W8A16, backbone)
    yield "W4A8, GPTQ, ends at 8 bits", recipe_for(s.W4A8, backbone, compensated)
    yield "W4A8, AdaRound, ends at 8 bits", recipe_for(s.W4A8, backbone, learnt)
    yield "W4A8, AdaRound from GPTQ, ends at 8 bits", recipe_for(s.W4A8, backbone, both)
    yield "W4A8, round-to-nearest, ends at 8 bits", recipe_for(s.W4A8, backbone, nearest)
    yield "W4A8, round-to-nearest, everything", tn.Recipe((tn.Rule("*", s.W4A8, nearest),))
    yield "W4A16, GPTQ, ends at 8 bits", recipe_for(s.W4A16, backbone, compensated)


def draw(sample: Any, denoiser: nn.Module, count: int, batch: int) -> tuple[Tensor, float]:
    """Pictures (count, C, H, W) and the median seconds a picture over the batches."""
    found, seconds = [], []
    for start in range(0, count, batch):
        size, begin = min(batch, count - start), time.perf_counter()
        found.append(sample(denoiser, FIRST_SEED + start, size).cpu())
        seconds.append((time.perf_counter() - begin) / size)
    return torch.cat(found), sorted(seconds)[len(seconds) // 2]


def row(name: str, pictures: Tensor, reference: Tensor, seconds: float, **more: Any) -> dict:
    """One line of the table."""
    values = psnr(pictures, reference).tolist()
    facts = {
        "scheme": name,
        "psnr_median_db": round(percentile(values, 50), 2),
        "psnr_p5_db": round(percentile(values, 5), 2),
        "ssim": round(float(ssim(pictures, reference).mean()), 5),
        "lpips": round(float(lpips(pictures, reference).mean()), 5),
        "seconds_per_picture": round(seconds, 4),
    } | more
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    return facts


def measured(args: argparse.Namespace) -> Iterator[dict]:
    """Every row, the cheap ones first."""
    pipe = load(args.model, args.device)
    steps, guidance = defaults(args.model)
    denoiser, kind = denoiser_of(pipe), effort(args.preset)
    calibration = prompts("default" if args.model.startswith("demo:") else "general")
    trajectory: Trajectory = tn.record(
        pipe, calibration[: kind.prompts], steps=steps, guidance=guidance, batch=kind.batch
    )
    evaluation = prompts("evaluation" if args.model.startswith("demo:") else "general")
    sample = sampler(pipe, tuple(evaluation), steps, guidance)
    reference, seconds = draw(sample, denoiser, args.count, args.batch)
    yield row("full precision", reference, reference, seconds)
    if wanted("bf16", args.rows):
        twin = bf16_copy(denoiser, bf16_arithmetic(device_and_dtype(denoiser)[0]))
        yield row("bf16", draw(sample, twin, args.count, args.batch)[0], reference, float("nan"))
    for name, artifact, spent in artifacts(args, pipe, trajectory):
        with tn.attach(pipe, artifact, execution="int8") as attached:
            pictures, seconds = draw(sample, denoiser, args.count, args.batch)
            mode = attached.execution()["mode"]
            share = round(attached.int8_weight_share(), 4)
        yield row(
            name, pictures, reference, seconds,
            execution=mode, int8_weight_share=share, calibration_seconds=spent,
        )  # fmt: skip


def artifacts(
    args: argparse.Namespace, pipe: Any, trajectory: Trajectory
) -> Iterator[tuple[str, tn.Artifact, float | None]]:
    """(name, artifact, seconds of calibration): files that are there, then what is made here."""
    for file in args.artifact:
        found = tn.Artifact.load(file)
        found.header.pop("route", None)  # weights alone
        yield f"{file.stem}, preset {found.header['preset']}", found, None
    for name, recipe in recipes(denoiser_of(pipe), args.preset):
        if not wanted(name, args.rows):
            continue
        begin, options = time.perf_counter(), {"preset": args.preset, "temporal": args.temporal}
        artifact = tn.quantize(pipe, recipe, trajectory, seed=args.seed, **options)
        yield name, artifact, round(time.perf_counter() - begin, 1)


def wanted(name: str, patterns: list[str]) -> bool:
    """Whether a row is asked for."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo:transformer")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--temporal", default="auto", help="none, tiar, table or auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--rows", nargs="*", default=["*"], help="names of rows to make (fnmatch)")
    parser.add_argument("--artifact", nargs="*", type=Path, default=[], help="measured as well")
    args = parser.parse_args()
    rows = list(measured(args))
    cuda = args.device is not None and args.device.startswith("cuda")
    chip = torch.cuda.get_device_name(args.device) if cuda else cpu_name()
    print(f"\n{args.model}, {args.count} prompts, preset {args.preset}; {chip}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"diffusers {diffusers.__version__}, {datetime.date.today()}\n")
    print("| scheme | PSNR dB, median (5th percentile) | SSIM | LPIPS | s a picture | execution |")
    print("| --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(
            f"| {r['scheme']} | {r['psnr_median_db']} ({r['psnr_p5_db']}) | {r['ssim']} "
            f"| {r['lpips']} | {r['seconds_per_picture']} | {r.get('execution', '')} |"
        )


def cpu_name() -> str:
    """The processor and its widest instruction set that torch uses."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            line = next(row for row in file if row.startswith("model name"))
    except (OSError, StopIteration):
        line = platform.processor()
    return f"{line.split(':')[-1].strip()} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    main()
