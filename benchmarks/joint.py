"""Quantization and the forecast together: distance to full precision, alone and joined.

    python benchmarks/joint.py --count 8                              # on a CPU, shipped artifacts
    python benchmarks/joint.py --count 64 --device cuda --batch 32 --out joint.jsonl

One JSON line a row as it goes and a table at the end; a row that OUT already has is not made again.
For each demo model: its artifacts in --artifacts (the shipped ones), named as there, with no call
skipped and with `--shares` of them skipped. The kernel is that of the model in full precision,
recorded on `--recorded` prompts of the list "default", even where an artifact has one of its own.
PSNR to the full-precision run at equal seeds over `--count` evaluation prompts; int8 execution.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.default_kernels import images, kernel_of_run
from benchmarks.schedules import MODELS, chip, surroundings
from tenuto.measure import psnr
from tenuto.runtime import Patches, percentile
from tenuto.runtime.attachment import install
from tenuto.sampling.loading import load

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "artifacts"


def rows(args: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    """Every row that is not `done`."""
    for model in MODELS if args.model == "all" else (args.model,):
        pipe = load(f"demo:{model}", args.device)
        files = sorted(args.artifacts.glob(f"demo-{model}.*.safetensors"))
        kernel = full = None
        for file in (None, *files):
            for share in (0.0, *args.shares):
                if file is None and not share:
                    continue
                about = {
                    "model": model, "artifact": "none" if file is None else file.name,
                    "share": share, "count": args.count, "recorded": args.recorded,
                    "chip": chip(pipe.device),
                }  # fmt: skip
                key = json.dumps(about, sort_keys=True)
                if key in done:
                    continue
                kernel = kernel or kernel_of_run(pipe, args.recorded)
                full = images(pipe, args) if full is None else full
                made = None if file is None else bare(tn.Artifact.load(file))
                speedup = math.floor(1e4 / (1 - share)) / 1e4
                patches = Patches(
                    made, route=False, execution="int8", kernel=kernel, speedup=speedup
                )
                with install(pipe, patches) as attached:
                    found = images(pipe, args)
                    counts = attached.counts()[""]
                db = psnr(full, found).tolist()
                yield {"key": key} | about | {
                    "psnr": median(db), "psnr_5": percentile(db, 5), "calls": counts,
                } | surroundings()  # fmt: skip


def bare(artifact: tn.Artifact) -> tn.Artifact:
    """Without a forecast of its own."""
    header = {k: v for k, v in artifact.header.items() if k != "forecast"}
    kept = {k: v for k, v in artifact.tensors.items() if not k.startswith("forecast/")}
    return tn.Artifact(header, kept)


def markdown(found: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = ["| model | artifact | skipped | PSNR (5th) |", "|" + " --- |" * 4]
    for r in found:
        lines.append(
            f"| {r['model']} | {r['artifact']} | {r['share']:.0%} | {r['psnr']:.1f} "
            f"({r['psnr_5']:.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="all", choices=["all", *MODELS])
    parser.add_argument("--artifacts", type=Path, default=SHIPPED)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5])
    parser.add_argument("--recorded", type=int, default=4)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    found = []
    if args.out and args.out.exists():
        found = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    for row in rows(args, {row["key"] for row in found}):
        found.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print("\n" + markdown(found))


if __name__ == "__main__":
    main()
