"""One kernel in other runs: other steps, guidance, solvers and starts than were recorded.

    python benchmarks/forecast_runs.py --model all --device cuda --batch 32 --out runs.jsonl
    python benchmarks/forecast_runs.py --model unet --count 4 --recorded 4         # on a CPU

The kernel is of `--recorded` images at the model's own steps, guidance and sampler. Each row is a
run of another kind at the same speedup, with that kernel and with one that was recorded in that
very run: PSNR to the full run at equal seeds, median over `--count` evaluation prompts. "flow" is
the demo U-Net as a flow model (benchmarks/flow_demo.py), recorded at shift 1; `--flow FOLDER` has
rows of a flow model that was trained (assets/train.py denoiser --flow). Image to image starts from
the model's own images. One JSON line a row as it goes, a Markdown table at the end; a row that
OUT already has is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks import flow_demo
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


TRAINED = "trained flow"
FLOWS = "flow", TRAINED


@dataclass(frozen=True)
class Run:
    """A kind of run; None: the model's own. models: those that have it."""

    name: str
    steps: int | None = None
    guidance: float | None = None
    solver: str | None = None
    shift: float | None = None
    strength: float | None = None
    models: tuple[str, ...] = (*MODELS, *FLOWS)


TO_IMAGE = 40  # steps, of which strength .3 does 12
RUNS = (
    Run("as recorded"),
    *(Run(f"{steps} steps", steps=steps) for steps in (10, 30, 50)),
    *(Run(f"guidance {g:g}", guidance=g) for g in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)),
    *(Run(name, solver=solver, models=MODELS) for name, solver in SOLVERS.items()),
    *(Run(f"shift {x:g}, {n} steps", steps=n, shift=x, models=FLOWS)
      for x in (1.0, 3.0) for n in (20, 50)),
    Run("Heun, two calls a step", solver="FlowMatchHeun", models=FLOWS),
    *(Run(f"image to image, strength {x:g}", steps=TO_IMAGE, strength=x, models=("unet", "flow"))
      for x in (0.3, 0.6, 0.9)),
)  # fmt: skip


class Runs:
    """The rows of one model."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        self.args, self.model = args, model
        if model == "flow":
            self.pipe, self.own = flow_demo.flow_pipeline(args.device), defaults("demo:unet")
        elif model == TRAINED:
            self.pipe = flow_demo.trained_flow(args.flow, args.device)
            self.own = defaults(str(args.flow))
        else:
            self.pipe, self.own = load(f"demo:{model}", args.device), defaults(f"demo:{model}")
        self.lines = tuple(tn.prompts("evaluation"))
        self.made: dict[tuple[int, int], Tensor] = {}

    @cached_property
    def artifact(self) -> tn.Artifact:
        """With the kernel of the model's own run."""
        return self.recorded(RUNS[0])

    def recorded(self, run: Run) -> tn.Artifact:
        """An artifact with the kernel of such a run, or with none where it has none."""
        pipe, lines, count = self.way(run), tn.prompts("default"), self.args.recorded
        call = None
        if run.strength is not None:
            call = {"image": self.starts(0, count), "strength": run.strength}
        found = tn.record(
            pipe, lines[:count], batch=count, call=call,
            steps=run.steps or self.own.steps, guidance=self.guidance(run),
        )  # fmt: skip
        return tn.Artifact.new(self.pipe, found.schedule()).add_forecast(found.kernel)

    def guidance(self, run: Run) -> float | None:
        """Of a run."""
        return self.own.guidance if run.guidance is None else run.guidance

    def way(self, run: Run) -> Any:
        """The pipeline of a run, of the same denoiser."""
        if run.strength is None:
            return self.pipe
        kind, parts = diffusers.StableDiffusionImg2ImgPipeline, self.pipe.components
        return kind(**parts, requires_safety_checker=False)

    def starts(self, seed: int, count: int) -> Tensor:
        """What image to image begins with, in [0, 1]: the model's own images, of full runs.

        They are made before anything is attached, and kept.
        """
        if (seed, count) not in self.made:
            sample = sampler(self.pipe, self.lines, self.own.steps, self.own.guidance)
            with torch.no_grad():
                found = sample(denoiser_of(self.pipe), seed + 5_000, count)
            self.made[seed, count] = (found.clamp(-1, 1) / 2 + 0.5).to(self.pipe.device)
        return self.made[seed, count]

    @contextmanager
    def solved_as(self, run: Run) -> Iterator[None]:
        """The pipeline with the solver of a run."""
        before = self.pipe.scheduler
        if run.solver is not None:
            kind = getattr(flow_demo, run.solver, None) or getattr(diffusers, run.solver)
            self.pipe.scheduler = kind.from_config(before.config)
        elif run.shift is not None:
            self.pipe.scheduler = type(before).from_config(before.config, shift=run.shift)
        try:
            yield
        finally:
            self.pipe.scheduler = before

    def rows(self, done: set[str]) -> Iterator[dict[str, Any]]:
        """Every row that is not `done`."""
        for run in RUNS:
            about = {
                "model": self.model, "run": run.name, "speedup": self.args.speedup,
                "count": self.args.count, "recorded": self.args.recorded,
                "chip": chip(self.pipe.device),
            }  # fmt: skip
            key = json.dumps(about, sort_keys=True)
            if self.model in run.models and self.args.only in run.name and key not in done:
                yield {"key": key} | about | self.row(run) | surroundings()

    def row(self, run: Run) -> dict[str, Any]:
        """Both distances of one kind of run."""
        artifact = self.artifact
        with self.solved_as(run):
            full, own = self.images(run), self.recorded(run)
            with tn.attach(self.pipe, artifact, speedup=self.args.speedup) as attached:
                found, counts = self.images(run), attached.counts()[""]
            mine = None
            if "forecast" in own.header:
                with tn.attach(self.pipe, own, speedup=self.args.speedup):
                    mine = self.images(run)
        return {
            "computed": counts[0], "skipped": counts[1],
            "psnr": near(full, found), "psnr_own": None if mine is None else near(full, mine),
        }  # fmt: skip

    def images(self, run: Run) -> Tensor:
        """Images of a run, on the CPU."""
        pipe, found = self.way(run), []
        for start in range(SEED, SEED + self.args.count, self.args.batch):
            size = min(self.args.batch, SEED + self.args.count - start)
            call = None
            if run.strength is not None:
                call = {"image": self.starts(start, size), "strength": run.strength}
            steps = run.steps or self.own.steps
            sample = sampler(pipe, self.lines, steps, self.guidance(run), call=call)
            with torch.no_grad():
                found.append(sample(denoiser_of(pipe), start, size).clamp(-1, 1).cpu())
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
    parser.add_argument("--model", default="all", choices=["all", *MODELS, *FLOWS])
    parser.add_argument("--flow", type=Path, help="a folder of assets/train.py denoiser --flow")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--recorded", type=int, default=8)
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    if args.model == TRAINED and args.flow is None:
        parser.error("a trained flow model needs --flow.")
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    if args.out and args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    done = {row["key"] for row in rows}
    every = (*MODELS, "flow", *([TRAINED] if args.flow else []))
    for model in every if args.model == "all" else (args.model,):
        for row in Runs(args, model).rows(done):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
