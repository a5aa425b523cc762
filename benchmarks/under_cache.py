"""Quantization and skipped work, calibrated apart and together, beside naive stacking.

    python benchmarks/under_cache.py --out under.jsonl                     # on a CPU
    python benchmarks/under_cache.py --count 64 --device cuda --batch 32 --preset thorough ...
    python benchmarks/under_cache.py ... --fid 10000 --data DATA --features inception.safetensors

One JSON line a row as it goes and a table at the end; a row that OUT already has is not made again,
and artifacts are kept in --work. For each demo model, scheme and way to skip half of the work (the
forecast; the `late interval` of branches):
    full precision     work skipped, nothing quantized
    quantized          every call computed
    naive              calibrated on full runs, then work skipped
    joint              calibrated on the calls of runs with that work skipped, each step by what it
                       counts for the result (`quantize(..., under=...)`)
    joint, alike       the same, with every step counting the same
    joint, again       as joint, on runs of the model that joint has quantized
    weighted           calibrated on full runs, each step by what it counts there
    planned            as naive, the forecast planned with what rounding adds to each step
    joint, planned     both
    errors             alone, no images: how the rounding errors of neighbouring steps correlate,
                       and what each step counts for the result with half of the calls skipped
Ranges that are found on the fly, with weights to nearest (`w8a8`), see no recorded call: joint is
naive there. PSNR to the full-precision run of all calls at equal seeds over `--count` evaluation
prompts, in int8; `gain` is the mean difference to naive of each image, and its standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.default_kernels import images
from benchmarks.joint import bare, far
from benchmarks.resumable import resumed
from benchmarks.schedules import MODELS, chip, surroundings
from tenuto.artifact import kernel_of
from tenuto.caching import CacheSchedule
from tenuto.caching.at_share import unmeasured
from tenuto.calibration.rounding_errors import added_errors, with_rounding
from tenuto.calibration.router.rollout import intercepted
from tenuto.calibration.under_cache import counts_of, under_cache
from tenuto.measure import psnr
from tenuto.model import denoiser_of, describe
from tenuto.runtime import Patches, percentile
from tenuto.runtime.attachment import install
from tenuto.sampling import Trajectory
from tenuto.sampling.loading import defaults, load

FORECAST, LATE, ALL = "forecast", "late interval", "nothing"
JOINT = ("joint", "joint, alike", "joint, again", "joint, planned")
PLANNED = ("planned", "joint, planned")
HOWS = (*JOINT, "weighted", "planned", "errors")
FIRST = 4  # steps that the late interval computes, at least


class Setting:
    """One demo model with its recording, made when it is first asked for."""

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.pipe = load(f"demo:{model}", args.device)

    @cached_property
    def recorded(self) -> Trajectory:
        """As the preset records it, of `--recorded` prompts."""
        known, lines = defaults(self.pipe), tn.prompts("default")[: self.args.recorded]
        return tn.record(self.pipe, lines, steps=known.steps, guidance=known.guidance, batch=4)

    @cached_property
    def reference(self) -> Tensor:
        """Images of all calls in full precision."""
        return images(self.pipe, self.args)

    def skipped(self, work: str) -> float | CacheSchedule:
        """What `under_cache` takes."""
        if work != LATE:
            return 2.0 if work == FORECAST else 1.0
        branches = [b.name for b in describe(denoiser_of(self.pipe)).branches]
        return unmeasured(0.5, FIRST, self.recorded.timesteps, branches)

    def artifact(self, scheme: str, how: str, work: str) -> tn.Artifact:
        """Made, or read from `--work`."""
        how = {"planned": "naive", "joint, planned": "joint"}.get(how, how)
        args, of = self.args, work if how in JOINT else ALL
        name = f"{self.model}.{scheme}.{how}.{of}.{args.preset}.{args.recorded}.safetensors"
        file = args.work / name.replace(", ", "-").replace(" ", "-")
        if not file.exists():
            under = None
            if how != "naive":
                before = self.artifact(scheme, "joint", work) if how == "joint, again" else None
                under = under_cache(
                    self.pipe, self.recorded, self.skipped(of), artifact=before,
                    weighted=how != "joint, alike",
                )  # fmt: skip
            made = tn.quantize(
                self.pipe, scheme, self.recorded, preset=args.preset, under=under, measure=False
            )
            args.work.mkdir(parents=True, exist_ok=True)
            made.save(file)
        return tn.Artifact.load(file)

    def errors(self, artifact: tn.Artifact) -> dict[str, Any]:
        """How what rounding adds to neighbouring steps correlates, and what each step counts."""
        found = [e.double().flatten() for e in self.added(artifact)]
        alike = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairwise(found)]
        counts = [None if c is None else round(c, 4) for c in counts_of(self.recorded, 2.0)]
        return {"correlations": [round(c, 3) for c in alike], "counts": counts}

    def added(self, artifact: tn.Artifact) -> list[Tensor]:
        """What it adds to the output of each step of the first recorded run."""
        found = added_errors(self.pipe, artifact, self.recorded)
        return [found[t] for t in self.recorded.timesteps]

    @contextmanager
    def attached(self, artifact: tn.Artifact | None, how: str, work: str) -> Iterator[None]:
        """The pipeline as a row has it."""
        speedup, kernel = 2.0 if work == FORECAST else 1.0, self.recorded.kernel
        if artifact is not None and how in PLANNED:
            kernel = kernel_of(with_rounding(self.pipe, artifact, self.recorded))
        made = None if artifact is None else bare(artifact)
        patches = Patches(made, route=False, execution="int8", kernel=kernel, speedup=speedup)
        with ExitStack() as stack:
            stack.enter_context(install(self.pipe, patches))
            if work == LATE:
                schedule: Any = self.skipped(LATE)
                times, denoiser = self.recorded.timesteps, denoiser_of(self.pipe)
                stack.enter_context(intercepted(denoiser, times, schedule))
            yield


def kinds(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """(scheme, how, what is skipped) of each row of a model."""
    if args.hows == ["errors"]:
        yield from ((scheme, "errors", ALL) for scheme in args.schemes)
        return
    for work in args.skip:
        yield "none", "full precision", work
    for scheme in args.schemes:
        yield scheme, "quantized", ALL
        if "weighted" in args.hows and scheme != "w8a8":
            yield scheme, "weighted", ALL
        for work in args.skip:
            yield scheme, "naive", work
            for how in args.hows:
                seen = scheme != "w8a8" or how == "planned"
                if seen and (work == FORECAST or how not in PLANNED):
                    yield scheme, how, work


def rows(args: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    """Every row that is not `done`."""
    for model in MODELS if args.model == "all" else (args.model,):
        setting = None
        for scheme, how, work in kinds(args):
            about = {
                "model": model, "scheme": scheme, "how": how, "skipped": work, "count": args.count,
                "preset": args.preset, "recorded": args.recorded, "fid_images": args.fid,
            }  # fmt: skip
            key = json.dumps(about, sort_keys=True)
            if key in done:
                continue
            setting = setting or Setting(model, args)
            calibrated = "naive" if how in ("quantized", "errors") else how
            made = None if scheme == "none" else setting.artifact(scheme, calibrated, work)
            if how == "errors" and made is not None:
                yield {"key": key} | about | setting.errors(made) | surroundings()
                continue
            wanted = setting.reference
            with setting.attached(made, how, work):
                found = images(setting.pipe, args)
                distance = far(setting.pipe, args) if args.fid else {}
            db = [round(x, 3) for x in psnr(wanted, found).tolist()]
            yield {"key": key} | about | {
                "psnr": median(db), "psnr_5": percentile(db, 5), "each": db,
                "chip": chip(setting.pipe.device),
            } | distance | surroundings()  # fmt: skip


def gain(row: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """The mean difference to the row to beat, and its standard error."""
    same = {k: row[k] for k in ("model", "scheme", "skipped", "count", "preset", "recorded")}
    first = "quantized" if row["skipped"] == ALL else "naive"
    naive = [r for r in found if r["how"] == first and all(r[k] == v for k, v in same.items())]
    if not naive or row["how"] == first:
        return ""
    gaps = [a - b for a, b in zip(row["each"], naive[0]["each"], strict=True)]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return f"{mean(gaps):+.2f} ± {error:.2f}"


def markdown(found: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = "| model | scheme | skipped | calibrated | PSNR (5th) | gain | FID |"
    lines = [head, "|" + " --- |" * 7]
    for r in (r for r in found if r["how"] == "errors"):
        alike, counts = r["correlations"], [c for c in r["counts"] if c is not None]
        print(
            f"{r['model']} {r['scheme']}: errors of neighbouring steps correlate by {min(alike)} "
            f"to {max(alike)}, median {median(alike)}; steps count {min(counts)} to {max(counts)}"
        )
    for r in (r for r in found if "each" in r):
        fid = f"{r['fid']:.2f}" if "fid" in r else "-"
        lines.append(
            f"| {r['model']} | {r['scheme']} | {r['skipped']} | {r['how']} | {r['psnr']:.1f} "
            f"({r['psnr_5']:.1f}) | {gain(r, found)} | {fid} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="all", choices=["all", *MODELS])
    parser.add_argument("--schemes", nargs="+", default=["w4a8", "w8a8", "w8a8-static"])
    parser.add_argument("--skip", nargs="+", default=[FORECAST, LATE], choices=[FORECAST, LATE])
    parser.add_argument("--hows", nargs="*", default=["joint", "planned"], choices=HOWS)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--recorded", type=int, default=16, help="prompts of the calibration")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("under-cache"), help="for artifacts")
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
