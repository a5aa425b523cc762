"""What calibration takes, beside reconstruction as TFMQ-DM's predecessors and its code do it.

    python benchmarks/calibration_time.py --model unet --count 16 --out time.jsonl

One W4A8 calibration a row, all on the same prompts, with one thread; `cpu` are processor seconds,
so that other work on the machine does not count:
    ours               whole runs recorded, a table for the time path, the preset's algorithm
    restarts           the sampler is started anew for every step (the released code does so), and
                       every block, the time path among them, is reconstructed by AdaRound
    whole runs         the same reconstruction on whole runs
PSNR is to full precision at equal seeds, median and 5th percentile over `--count` prompts.
One JSON line a row as it goes; a row that OUT already has is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.default_kernels import images
from benchmarks.resumable import resumed
from benchmarks.schedules import MODELS, chip, surroundings
from tenuto.calibration import effort
from tenuto.measure import psnr
from tenuto.model import Leave, Signature, all_frozen, denoiser_of, map_tensors, watched
from tenuto.runtime import percentile
from tenuto.sampling import Call, Trajectory
from tenuto.sampling.loading import defaults, load

ROWS = ("ours", "whole runs", "restarts")


def restarted(pipe: Any, known: Trajectory) -> Trajectory:
    """As many calls of each step as `known` has, each of a run of its own, which stops there."""
    denoiser, sample = denoiser_of(pipe), known.rollout()
    facts, count, calls = Signature(denoiser), len(known.prompts), list[Call]()
    with all_frozen([denoiser]), torch.no_grad():
        for run in range(known.runs):
            for row, timestep in enumerate(known.timesteps):
                left = row

                def look(name: str, args: Any, kwargs: Any) -> None:
                    nonlocal left
                    if not left:
                        inputs = facts.inputs(args, kwargs)
                        kept = map_tensors(lambda t: t.detach().to("cpu", copy=True), inputs)
                        calls.append(Call(run, row, timestep, kept))  # noqa: B023
                        raise Leave
                    left -= 1

                seed = known.seed + run * known.batch + (1 + row) * count  # the same prompts
                with watched(denoiser, before=look), suppress(Leave):
                    sample(denoiser, seed, known.batch)
    return replace(known, calls=calls)


def rows(args: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    """Every row that is not `done`."""
    for model in MODELS if args.model == "all" else (args.model,):
        pipe = load(f"demo:{model}", args.device)
        known, lines = defaults(pipe), tn.prompts("default")[: args.recorded]
        batch = min(args.recorded, effort(args.preset).batch)
        full = None
        for how in args.rows:
            about = {
                "model": model, "how": how, "preset": args.preset, "recorded": args.recorded,
                "count": args.count,
            }  # fmt: skip
            key = json.dumps(about, sort_keys=True)
            if key in done:
                continue
            times = [(time.process_time(), time.perf_counter())]
            recorded = tn.record(
                pipe, lines, steps=known.steps, guidance=known.guidance, batch=batch
            )  # fmt: skip
            if how == "restarts":
                times = [(time.process_time(), time.perf_counter())]
                recorded = restarted(pipe, recorded)
            times.append((time.process_time(), time.perf_counter()))
            ways: Any = {} if how == "ours" else {"rounding": "adaround", "temporal": "none"}
            made = tn.quantize(pipe, "w4a8", recorded, preset=args.preset, measure=False, **ways)
            times.append((time.process_time(), time.perf_counter()))
            full = images(pipe, args) if full is None else full
            with tn.attach(pipe, made, execution="int8"):
                db = psnr(full, images(pipe, args)).tolist()
            cpu, wall = ([round(b[i] - a[i], 1) for a, b in pairwise(times)] for i in (0, 1))
            yield {"key": key} | about | {
                "cpu": sum(cpu), "cpu_recording": cpu[0], "cpu_quantizing": cpu[1], "wall": wall,
                "psnr": median(db), "psnr_5": percentile(db, 5), "chip": chip(pipe.device),
            } | surroundings()  # fmt: skip


def markdown(found: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = "| model | how | recording, CPU s | quantizing, CPU s | both by the clock | PSNR (5th) |"
    lines = [head, "|" + " --- |" * 6]
    for r in found:
        taken = f"{r['cpu_recording']:.0f} | {r['cpu_quantizing']:.0f} | {sum(r['wall']):.0f}"
        db = f"{r['psnr']:.1f} ({r['psnr_5']:.1f})"
        lines.append(f"| {r['model']} | {r['how']} | {taken} | {db} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="all", choices=["all", *MODELS])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--recorded", type=int, default=16, help="prompts of the calibration")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    resumed(args.out, partial(rows, args), markdown)


if __name__ == "__main__":
    main()
