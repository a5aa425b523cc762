"""One kernel in other runs: other steps, guidance and solvers than were recorded.

    python benchmarks/forecast_runs.py --model all --device cuda --out runs.jsonl
    python benchmarks/forecast_runs.py --model unet --count 8 --speedup 2          # on a CPU

The kernel is of `--recorded` images at the model's own steps, guidance and sampler. Each row is a
run of another kind at the same speedup, with that kernel and with one that was recorded in that
very run: PSNR to the full run at equal seeds, median over `--count` evaluation prompts. One JSON
line a row as it goes, a Markdown table at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.schedules import MODELS, SEED, chip, surroundings
from tenuto.measure import psnr
from tenuto.model import denoiser_of
from tenuto.sampling import sampler
from tenuto.sampling.loading import defaults, load

SOLVERS = {
    "Euler": "EulerDiscreteScheduler",
    "DPM-Solver++ 2M": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Euler a (stochastic)": "EulerAncestralDiscreteScheduler",
}


@dataclass(frozen=True)
class Run:
    """A kind of run; None: the model's own."""

    name: str
    steps: int | None = None
    guidance: float | None = None
    solver: str | None = None


RUNS = (
    Run("as recorded"),
    *(Run(f"{steps} steps", steps=steps) for steps in (10, 30, 50)),
    *(Run(f"guidance {g:g}", guidance=g) for g in (1.0, 4.0, 7.0)),
    *(Run(name, solver=solver) for name, solver in SOLVERS.items()),
)


class Runs:
    """The rows of one model."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        self.args, self.model = args, model
        self.pipe = load(f"demo:{model}", args.device)
        self.own = defaults(f"demo:{model}")
        self.artifact = self.recorded(RUNS[0])
        self.lines = tuple(tn.prompts("evaluation"))

    def recorded(self, run: Run) -> tn.Artifact:
        """An artifact with the kernel of such a run, or with none where it has none."""
        found = tn.record(
            self.pipe, tn.prompts("default")[: self.args.recorded], batch=self.args.recorded,
            steps=run.steps or self.own.steps, guidance=self.guidance(run),
        )  # fmt: skip
        return tn.Artifact.new(self.pipe, found.schedule()).add_forecast(found.kernel)

    def guidance(self, run: Run) -> float | None:
        """Of a run."""
        return self.own.guidance if run.guidance is None else run.guidance

    @contextmanager
    def solved_as(self, run: Run) -> Iterator[None]:
        """The pipeline with the solver of a run."""
        import diffusers

        before = self.pipe.scheduler
        if run.solver is not None:
            self.pipe.scheduler = getattr(diffusers, run.solver).from_config(before.config)
        try:
            yield
        finally:
            self.pipe.scheduler = before

    def row(self, run: Run) -> dict[str, Any]:
        """Both distances of one kind of run."""
        with self.solved_as(run):
            full, own = self.images(run), self.recorded(run)
            with tn.attach(self.pipe, self.artifact, speedup=self.args.speedup) as attached:
                found, counts = self.images(run), attached.counts()[""]
            mine = None
            if "forecast" in own.header:
                with tn.attach(self.pipe, own, speedup=self.args.speedup):
                    mine = self.images(run)
        return {
            "model": self.model, "run": run.name, "speedup": self.args.speedup,
            "computed": counts[0], "skipped": counts[1], "count": self.args.count,
            "recorded": self.args.recorded, "chip": chip(self.pipe.device),
            "psnr": near(full, found), "psnr_own": None if mine is None else near(full, mine),
        } | surroundings()  # fmt: skip

    def images(self, run: Run) -> Tensor:
        """Images of a run, on the CPU."""
        sample = sampler(self.pipe, self.lines, run.steps or self.own.steps, self.guidance(run))
        found = []
        with torch.no_grad():
            for start in range(SEED, SEED + self.args.count, self.args.batch):
                size = min(self.args.batch, SEED + self.args.count - start)
                found.append(sample(denoiser_of(self.pipe), start, size).clamp(-1, 1).cpu())
        return torch.cat(found)


def near(a: Tensor, b: Tensor) -> float:
    """The median PSNR in dB; 100 for equal images."""
    return min(100.0, median(psnr(a, b).tolist()))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = "| model | run | skipped | PSNR, kernel of the default run | kernel of its own |"
    lines = [head, "|" + " --- |" * 5]
    for r in rows:
        share = r["skipped"] / max(1, r["skipped"] + r["computed"])
        own = "-" if r["psnr_own"] is None else f"{r['psnr_own']:.1f}"
        lines.append(f"| {r['model']} | {r['run']} | {share:.0%} | {r['psnr']:.1f} | {own} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="all", choices=["all", *MODELS])
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--recorded", type=int, default=8)
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    for model in MODELS if args.model == "all" else (args.model,):
        runs = Runs(args, model)
        for run in RUNS:
            rows.append(runs.row(run))
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
