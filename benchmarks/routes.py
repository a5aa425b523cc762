"""Cache schedules compared: distance to the full picture at equal seeds, for several reuse ratios.

    python benchmarks/routes.py                                  # demo:transformer, 64 prompts
    python benchmarks/routes.py MODEL --reuse 0.3 0.5 --count 64 --preset standard --out r.jsonl
    python benchmarks/routes.py demo:unet --device cuda --batch 32 \\
        --pictures 10000 --data DATA --features inception.safetensors       # and FID, KID

For each ratio: the router trained from random logits, interval reuse from the first step, the late
interval, the step-level programme, random tables, fewer steps at equal cost, and the route that
`train_router` chose. Where a kind has several members (phases, powers, 20 random tables), the best
one is found on pictures of other seeds and then drawn in full; for random tables their mean is told
too. One JSON object a row as it goes, a table in Markdown at the end. FID and KID are those of
quality.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.quality_pictures import Real
from tenuto.caching import (
    POWERS,
    CacheSchedule,
    RandomTable,
    StepProgramme,
    interval_for,
    late_interval_for,
    saved,
    whole_steps,
)
from tenuto.calibration import PRESETS, train_router
from tenuto.calibration.router.rollout import evaluate, intercepted
from tenuto.measure import lpips, psnr, ssim
from tenuto.model import denoiser_of, device_and_dtype, multiply_adds
from tenuto.runtime import percentile
from tenuto.sampling import sampler, to_device
from tenuto.sampling.loading import defaults, load, prompts

DRAWN, CHOSEN = 10_000, 20_000  # first seeds: of the pictures compared, and of those that choose
RANDOM = 20


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo:transformer")
    parser.add_argument("--reuse", type=float, nargs="+", default=[0.3, 0.5, 0.6])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="standard", choices=list(PRESETS))
    parser.add_argument("--device", help="where all of it runs: cpu (the default), cuda, cuda:1")
    parser.add_argument("--pictures", type=int, default=0, help="for FID and KID; 0: neither")
    parser.add_argument("--data", type=Path, help="a folder with val*.npz and classes.json")
    parser.add_argument("--features", type=Path, help="what convert_inception.py made")
    parser.add_argument("--work", type=Path, help="a folder to go on in after an interruption")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    args = parser.parse_args()
    if args.pictures and (args.data is None or args.features is None):
        parser.error("FID needs --data and --features.")
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False  # what is compared is fp32
    rows = []
    for row in Benchmark(args).rows():
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print("\n" + markdown(rows))


class Benchmark:
    """One model, its full pictures, and what is needed to draw others."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.pipe = args, load(args.model, args.device)
        known = defaults(args.model)
        self.steps = args.steps or known.steps
        self.guidance = known.guidance if args.guidance is None else args.guidance
        self.denoiser = denoiser_of(self.pipe)
        fast, self.real = device_and_dtype(self.denoiser)[0].type == "cuda", None
        if args.pictures:
            self.real = Real(args.data, args.features, args.device, args.pictures, fast)
        self.trajectory = tn.record(
            self.pipe, prompts("default"), steps=self.steps, guidance=self.guidance,
            seed=args.seed, batch=PRESETS[args.preset].batch, runs=1,
        )  # fmt: skip
        self.branches = tuple(b.name for b in tn.describe(self.denoiser).branches)
        self.drawn = self.draw()
        self.full = self.drawn[0]

    @property
    def times(self) -> tuple[float, ...]:
        """The timesteps of the trajectory."""
        return self.trajectory.timesteps

    def draw(
        self, schedule: CacheSchedule | None = None, steps: int | None = None
    ) -> tuple[Tensor, float, dict[str, float]]:
        """The pictures (count, C, H, W) under a schedule, or in fewer steps.

        And the seconds a picture (median over batches); FID and KID where they are asked for.
        """
        count, lines = steps or self.steps, tuple(prompts("evaluation"))
        sample = sampler(self.pipe, lines, count, self.guidance)
        found, seconds = [], []
        with intercepted(self.denoiser, self.times, schedule):
            for seed in range(DRAWN, DRAWN + self.args.count, self.args.batch):
                size = min(self.args.batch, DRAWN + self.args.count - seed)
                start = time.perf_counter()
                found.append(sample(self.denoiser, seed, size).clamp(-1, 1).cpu())
                seconds.append((time.perf_counter() - start) / size)
            scores = {}
            if self.real is not None:
                scores = self.real.generated(self.pipe, self.denoiser, count, self.guidance)
        return torch.cat(found), median(seconds), scores

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row of the table."""
        yield self.row(0, "full", "", self.drawn, CacheSchedule.full(*self.grid()))
        for reuse in self.args.reuse:
            route, drawn = self.trained(reuse), {}
            for kind, (detail, table, more) in self.chosen(reuse, route).items():
                key = tuple(table.table.flatten().tolist())  # the default is one of the others
                drawn[key] = drawn.get(key) or self.draw(table)
                yield self.row(reuse, kind, detail, drawn[key], table) | more
            fewer = round(self.steps * (1 - reuse))
            yield self.row(reuse, "fewer steps", f"{fewer} steps", self.draw(steps=fewer), None)

    def grid(self) -> tuple[tuple[float, ...], tuple[str, ...]]:
        """Timesteps and branches: the arguments of a policy."""
        return self.times, self.branches

    def trained(self, reuse: float) -> tn.Artifact:
        """What `train_router` makes of the model at this ratio."""
        args, start = self.args, time.perf_counter()
        work = args.work / f"{reuse:g}" if args.work else None
        route = train_router(
            self.pipe, self.trajectory, reuse=reuse, preset=args.preset, seed=args.seed,
            work=work, on_progress=progress,
        )  # fmt: skip
        self.training_seconds = time.perf_counter() - start
        return route

    def chosen(
        self, reuse: float, route: tn.Artifact
    ) -> dict[str, tuple[str, CacheSchedule, dict[str, Any]]]:
        """kind -> (detail, the best of its kind, more columns)."""
        costs = tuple(route.tensors["route/costs"].tolist())
        whole = whole_steps(reuse, len(self.times))
        powers = {f"age^{p:g}": StepProgramme(whole, costs, p) for p in POWERS}
        kinds: dict[str, dict[str, Any]] = {
            "interval": {str(p): p for p in interval_for(whole, *self.grid())},
            "late interval": {str(p): p for p in late_interval_for(whole, *self.grid())},
            "step programme": powers,
            "random": {f"seed {s}": RandomTable(reuse, s) for s in range(RANDOM)},
        }
        facts = route.header["route"]
        seconds = {"training_seconds": round(self.training_seconds, 1)}
        found = {"router": (self.args.preset, self.table(route, "router"), seconds)}
        for kind, policies in kinds.items():
            tables = {name: policy(*self.grid()) for name, policy in policies.items()}
            errors = evaluate(self.denoiser, tables, self.trajectory, [CHOSEN], self.args.batch)
            best = min(errors, key=lambda name: errors[name])
            spread = {"mean_latent_error": mean(errors.values()), "members": len(errors)}
            found[kind] = (best, tables[best], spread | {"latent_error": errors[best]})
        found["default"] = (
            facts["policy"],
            self.table(route, "table"),
            {"scores": facts["scores"]},
        )
        return found

    def table(self, route: tn.Artifact, name: str) -> CacheSchedule:
        """A table of the artifact."""
        return CacheSchedule(route.tensors[f"route/{name}"], *self.grid())

    def row(
        self,
        reuse: float,
        kind: str,
        detail: str,
        drawn: tuple[Tensor, float, dict[str, float]],
        table: CacheSchedule | None,
    ) -> dict[str, Any]:
        """One row: how far these pictures are from the full ones, and what they cost."""
        pictures, seconds, scores = drawn
        decibel = psnr(pictures, self.full).tolist()
        return {
            "model": self.args.model,
            "reuse": reuse,
            "schedule": kind,
            "detail": detail,
            "psnr_db": {
                "median": finite(percentile(decibel, 50)),
                "p5": finite(percentile(decibel, 5)),
            },
            "ssim": float(ssim(pictures, self.full).mean()),
            "lpips": float(lpips(pictures, self.full).mean()),
            "reuse_ratio": table.reuse_ratio if table else None,
            "reuse_flops": saved(table, self.work()) if table else None,
            "seconds_per_picture": seconds,
            "count": self.args.count,
            "pictures": self.args.pictures,
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.args.seed,
            "machine": self.machine(),
            "threads": torch.get_num_threads(),
            "versions": {"tenuto": tn.__version__, "torch": torch.__version__},
        } | scores

    def work(self) -> dict[str, int]:
        """Multiply-adds of one call."""
        call = to_device(self.trajectory.calls[0].inputs, device_and_dtype(self.denoiser)[0])
        return multiply_adds(self.denoiser, (), call, self.branches)

    def machine(self) -> str:
        """What the pictures were drawn on."""
        device = device_and_dtype(self.denoiser)[0]
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
        return f"{platform.machine()}, {os.cpu_count()} CPUs"


def finite(value: float) -> float | None:
    """None for the infinite PSNR of equal pictures: JSON has no such number."""
    return value if math.isfinite(value) else None


def decibels(value: float | None) -> str:
    """A PSNR for the table."""
    return "equal" if value is None else f"{value:.1f}"


def progress(done: int, total: int, note: str) -> None:
    """One line on a terminal that is written over and over."""
    if sys.stderr.isatty():
        print(f"\r{done / total:4.0%} {note:50}", end="", file=sys.stderr, flush=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| reuse | schedule | which | PSNR dB, median (5th perc.) | SSIM | LPIPS | FID "
        "| FLOPs held | s a picture |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        decibel, held = row["psnr_db"], row["reuse_flops"]
        lines.append(
            f"| {row['reuse']:.0%} | {row['schedule']} | {row['detail']} "
            f"| {decibels(decibel['median'])} ({decibels(decibel['p5'])}) | {row['ssim']:.4f} "
            f"| {row['lpips']:.4f} | {row.get('fid', '-')} "
            f"| {'-' if held is None else f'{held:.0%}'} | {row['seconds_per_picture']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
