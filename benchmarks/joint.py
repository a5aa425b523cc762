"""Quantization and the forecast together: distance to full precision, alone and joined.

    python benchmarks/joint.py --count 8                              # on a CPU, shipped artifacts
    python benchmarks/joint.py --count 64 --device cuda --batch 32 --out joint.jsonl
    python benchmarks/joint.py ... --fid 10000 --data DATA --features inception.safetensors

One JSON line a row as it goes and a table at the end; a row that OUT already has is not made again.
For each demo model: its artifacts in --artifacts (the shipped ones), named as there, with no call
skipped and with `--shares` of them skipped. The kernel is that of the model in full precision,
recorded on `--recorded` prompts of the list "default", even where an artifact has one of its own.
PSNR to the full-precision run at equal seeds over `--count` evaluation prompts; int8 execution.
`--simulate` has a row more for each artifact: its codes computed in float. FID and KID x 1000
are of `--fid` images against the real ones in DATA; `--features`: of convert_inception.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.default_kernels import images, kernel_of_run
from benchmarks.quality_pictures import Real
from benchmarks.resumable import resumed
from benchmarks.schedules import MODELS, chip, surroundings
from tenuto.measure import psnr
from tenuto.model import denoiser_of
from tenuto.runtime import Patches, percentile
from tenuto.runtime.attachment import install
from tenuto.sampling.loading import defaults, load

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "artifacts"


def rows(args: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    """Every row that is not `done`."""
    for model in MODELS if args.model == "all" else (args.model,):
        pipe = load(f"demo:{model}", args.device)
        files = sorted(args.artifacts.glob(f"demo-{model}.*.safetensors"))
        kernel = full = None
        for file, share, simulate in kinds(files, args):
            about = {
                "model": model, "artifact": "none" if file is None else file.name,
                "share": share, "simulated": simulate, "count": args.count,
                "recorded": args.recorded, "fid_images": args.fid, "chip": chip(pipe.device),
            }  # fmt: skip
            key = json.dumps(about, sort_keys=True)
            if key in done:
                continue
            kernel = kernel or kernel_of_run(pipe, args.recorded)
            full = images(pipe, args) if full is None else full
            made = None if file is None else bare(tn.Artifact.load(file))
            speedup = math.floor(1e4 / (1 - share)) / 1e4
            patches = Patches(
                made, route=False, execution="int8", simulate=simulate, kernel=kernel,
                speedup=speedup,
            )  # fmt: skip
            with install(pipe, patches) as attached:
                found = images(pipe, args)
                counts = attached.counts()[""]
                distance = far(pipe, args) if args.fid and not simulate else {}
            db = psnr(full, found).tolist()
            yield {"key": key} | about | {
                "psnr": median(db), "psnr_5": percentile(db, 5), "calls": counts,
            } | distance | surroundings()  # fmt: skip


def kinds(files: list[Path], args: argparse.Namespace) -> Iterator[tuple[Path | None, float, bool]]:
    """Artifact, share of calls skipped, whether computed in float: of each row."""
    for file in (None, *files):
        for share in (0.0, *args.shares):
            if file is not None or share:
                yield file, share, False
        if file is not None and args.simulate:
            yield file, 0.0, True


def far(pipe: Any, args: argparse.Namespace) -> dict[str, float]:
    """FID and KID of the pipeline as it is."""
    known = defaults(pipe)
    real = reals(args.data, args.features, args.device, args.fid)
    return real.generated(pipe, denoiser_of(pipe), known.steps, known.guidance, args.fid_batch)


@cache
def reals(data: Path, features: Path, device: str | None, count: int) -> Real:
    """The real images: once for all rows."""
    return Real(data, features, device, count, fast=bool(device and device.startswith("cuda")))


def bare(artifact: tn.Artifact) -> tn.Artifact:
    """Without a forecast of its own."""
    header = {k: v for k, v in artifact.header.items() if k != "forecast"}
    kept = {k: v for k, v in artifact.tensors.items() if not k.startswith("forecast/")}
    return tn.Artifact(header, kept)


def markdown(found: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = ["| model | artifact | skipped | PSNR (5th) | FID | KID |", "|" + " --- |" * 6]
    for r in found:
        name = r["artifact"] + (", simulated" if r["simulated"] else "")
        far = " | ".join(f"{r[k]:.2f}" if k in r else "-" for k in ("fid", "kid_x1000"))
        lines.append(
            f"| {r['model']} | {name} | {r['share']:.0%} | {r['psnr']:.1f} "
            f"({r['psnr_5']:.1f}) | {far} |"
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
    parser.add_argument("--simulate", action="store_true", help="each artifact in float, too")
    parser.add_argument("--fid", type=int, default=0, help="images for FID and KID; 0: neither")
    parser.add_argument("--fid-batch", type=int, default=500)
    parser.add_argument("--data", type=Path, help="a folder with val*.npz and classes.json")
    parser.add_argument("--features", type=Path, help="what convert_inception.py made")
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    if args.fid and None in (args.data, args.features):
        parser.error("FID needs --data and --features.")
    torch.backends.cudnn.allow_tf32 = False
    resumed(args.out, partial(rows, args), markdown)


if __name__ == "__main__":
    main()
