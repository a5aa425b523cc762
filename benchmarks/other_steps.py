"""One calibration in other runs: made at 20 DDIM steps, used at other steps and with other solvers.

    python benchmarks/other_steps.py --images 8 --out other_steps.jsonl             # on a CPU
    python benchmarks/other_steps.py --images 64 --device cuda --batch 32 --out other_steps.jsonl
    python benchmarks/other_steps.py --model demo:unet --scheme w4a8 --run "Euler 20"   # one row

A row is a model, a scheme and a run. In that run images are generated three times from equal seeds:
in full precision, with the artifact that was calibrated at 20 DDIM steps ("transferred"), and with
one that was calibrated in that very run ("its own"), from the same prompts and noise. Reported is
the PSNR to full precision of both, and what the first has less: the difference of the medians, and
the mean of the differences image by image with its standard error. Images are of evaluation
prompts, the first `--images` of them; layers compute in int8. "DDIM 20, another seed" is the
measure for the rest: the same run, where its own calibration differs in the noise alone. Heun's
timesteps begin at 951 ("leading"): the demo models' own begin at sigma 20,000, and the step from
there to sigma 13 multiplies what his second evaluation is off by 800: there is no image.

w8a8 and w4a8 find the ranges of inputs on the fly; w8a8-static and w4a8-static store one a step. A
row that OUT already has is not made again, and WORK keeps the artifacts, so that a run that was cut
off goes on. One JSON line a row as it goes, a Markdown table at the end.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import diffusers
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.forecast_runs import SOLVERS
from benchmarks.quality import emit, known
from benchmarks.quality_rows import slug
from benchmarks.schedules import chip
from tenuto.artifact import fingerprint
from tenuto.calibration import effort
from tenuto.measure import psnr
from tenuto.model import denoiser_of
from tenuto.resume import digest
from tenuto.runtime import percentile
from tenuto.sampling import sampler
from tenuto.sampling.loading import defaults, load

FIRST = 10_000  # seed of the first image that is compared
LIMIT = 1.5  # dB that a calibration may lose in a run that is not its own
EQUAL = 200.0  # dB: what equal images count as
MODELS = ("demo:transformer", "demo:unet")
SCHEMES = ("w8a8", "w4a8")
KINDS = {"DDIM": "DDIMScheduler", **SOLVERS, "Heun": "HeunDiscreteScheduler"}


@dataclass(frozen=True)
class Run:
    """A kind of run. seed: of the noise that its own calibration is recorded with.

    spacing: of its timesteps, where it is not the model's own.
    """

    name: str
    steps: int
    solver: str
    seed: int = 0
    spacing: str | None = None


USUAL = Run("DDIM 20", 20, "DDIM")
RUNS = (
    Run("DDIM 20, another seed", 20, "DDIM", seed=1_000),
    *(Run(f"DDIM {steps}", steps, "DDIM") for steps in (10, 30, 50)),
    *(Run(f"{s} 20", 20, s) for s in ("Euler", "DPM-Solver++ 2M", "UniPC")),
    Run("Heun 20, leading", 20, "Heun", spacing="leading"),
)


class Study:
    """The rows of one model."""

    def __init__(self, name: str, asked: argparse.Namespace) -> None:
        self.name, self.asked = name, asked
        self.pipe, self.guidance = load(name, asked.device), defaults(name).guidance
        self.own, self.kind = self.pipe.scheduler, effort(asked.preset)
        self.prompts = asked.recorded or self.kind.prompts
        self.usual: dict[str, tn.Artifact] = {}
        self.recordings: dict[Run, tn.Trajectory] = {}

    def key(self, scheme: str, run: Run) -> dict[str, Any]:
        """What decides a row."""
        return {
            "model": self.name, "scheme": scheme, "run": run.name, "preset": self.asked.preset,
            "recorded": self.prompts, "images": self.asked.images, "weights": self.weights,
            "version": tn.__version__, "chip": chip(self.pipe.device),
        }  # fmt: skip

    @cached_property
    def weights(self) -> str:
        """Of the denoiser, as a hash."""
        return digest(fingerprint(denoiser_of(self.pipe)))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row that is asked for, from the file where it has it; run by run."""
        done = known(self.asked.out)
        for run in RUNS:
            if not any(fnmatch.fnmatchcase(run.name, p) for p in self.asked.run):
                continue
            full = None
            for scheme in self.asked.scheme:
                key = self.key(scheme, run)
                row = done.get(json.dumps(key, sort_keys=True))
                if row is None:
                    full = self.images(run) if full is None else full
                    row = {"key": key, **self.made(scheme, run, full), **surroundings()}
                    emit(row, self.asked.out)
                yield row
            self.recordings.pop(run, None)

    def made(self, scheme: str, run: Run, full: Tensor) -> dict[str, Any]:
        """The distances from full precision with both calibrations."""
        if scheme not in self.usual:
            self.usual[scheme] = self.calibrated(scheme, USUAL)
        artifacts = {"transferred": self.usual[scheme], "own": self.calibrated(scheme, run)}
        facts: dict[str, Any] = {
            "kept": {k: sorted(a.header.get("kept_in_float", {})) for k, a in artifacts.items()},
            "equal_codes": equal_codes(*artifacts.values()),
        }  # fmt: skip
        for name, artifact in artifacts.items():
            with tn.attach(self.pipe, artifact, execution="int8"):
                facts[name] = distances(full, self.images(run))
        return facts

    def calibrated(self, scheme: str, run: Run) -> tn.Artifact:
        """The artifact of a run, from the work folder if it is there."""
        words = (
            self.name.removeprefix("demo:"),
            scheme,
            run.name,
            self.asked.preset,
            str(self.prompts),
            self.weights,
        )
        path = self.asked.work and self.asked.work / f"{slug(' '.join(words))}.safetensors"
        if path is not None and path.exists():
            return tn.Artifact.load(path)
        with self.solved_as(run):
            artifact = tn.quantize(
                self.pipe, scheme, self.recorded(run), preset=self.asked.preset, measure=False
            )
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            artifact.save(path)
        return artifact

    def recorded(self, run: Run) -> tn.Trajectory:
        """What the artifacts of a run are calibrated on; all schemes share it."""
        if run not in self.recordings:
            self.recordings[run] = tn.record(
                self.pipe, tn.prompts("default")[: self.prompts], steps=run.steps,
                guidance=self.guidance, seed=run.seed, batch=self.kind.batch,
            )  # fmt: skip
        return self.recordings[run]

    @contextmanager
    def solved_as(self, run: Run) -> Iterator[None]:
        """The pipeline with the solver of a run."""
        kind, other = getattr(diffusers, KINDS[run.solver]), {"timestep_spacing": run.spacing}
        self.pipe.scheduler = kind.from_config(self.own.config, **(other if run.spacing else {}))
        try:
            yield
        finally:
            self.pipe.scheduler = self.own

    @torch.no_grad()
    def images(self, run: Run) -> Tensor:
        """The images of a run with the denoiser as it is, (N, 3, H, W) in [-1, 1], on the CPU."""
        count, size, found = self.asked.images, self.asked.batch, list[Tensor]()
        lines = tuple(tn.prompts("evaluation"))
        with self.solved_as(run):
            sample = sampler(self.pipe, lines, run.steps, self.guidance)
            for start in range(0, count, size):
                x = sample(denoiser_of(self.pipe), FIRST + start, min(size, count - start))
                found.append(x.clamp(-1, 1).cpu())
        return torch.cat(found)


def distances(full: Tensor, found: Tensor) -> list[float]:
    """The PSNR of each image, in dB."""
    return [min(EQUAL, x) for x in psnr(full, found).tolist()]


def equal_codes(a: tn.Artifact, b: tn.Artifact) -> float:
    """The share of the layers that both quantize whose weights are the same in both."""
    both = {*a.header["layers"]} & {*b.header["layers"]}
    one, two = a.section("weights"), b.section("weights")

    def same(name: str) -> bool:
        keys = [k for k in one if k.rpartition(".")[0] == name]
        return bool(keys) and all(k in two and torch.equal(one[k], two[k]) for k in keys)

    return sum(map(same, both)) / max(1, len(both))


def surroundings() -> dict[str, Any]:
    """What a table says it was made with."""
    return {
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(), "date": str(datetime.date.today()),
    }  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """What a calibration has more, in dB, than one of the run's own (less: negative).

    medians: of both, their difference; paired: the mean over images; error: of that (one: NaN).
    """

    medians: float
    paired: float
    error: float

    @property
    def holds(self) -> bool:
        """Whether it is within the limit."""
        return self.medians >= -LIMIT


def loss(row: dict[str, Any]) -> Loss:
    """Of a row."""
    transferred, own = row["transferred"], row["own"]
    each = [a - b for a, b in zip(transferred, own, strict=True)]
    error = stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return Loss(median(transferred) - median(own), fmean(each), error)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table a model and scheme."""
    text: list[str] = []
    for model, scheme in dict.fromkeys((r["key"]["model"], r["key"]["scheme"]) for r in rows):
        some = [r for r in rows if (r["key"]["model"], r["key"]["scheme"]) == (model, scheme)]
        key, last = some[0]["key"], some[-1]
        text += ["", f"{model}, {scheme}, preset {key['preset']}, {key['recorded']} prompts, "
                 f"{key['images']} images; {key['chip']}, {last['threads']} threads, "
                 f"torch {last['torch']}, diffusers {last['diffusers']}, {last['date']}", "",
                 "| run | PSNR dB, calibrated at 20 DDIM steps: median (5th) | in that run "
                 f"| difference | image by image | within {LIMIT} dB |",
                 "| --- " * 6 + "|", *map(line, some)]  # fmt: skip
    return "\n".join(text)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    both = [f"{median(x):.1f} ({percentile(x, 5):.1f})" for x in (row["transferred"], row["own"])]
    found = loss(row)
    return (
        f"| {row['key']['run']} | {' | '.join(both)} | {found.medians:+.2f} "
        f"| {found.paired:+.2f} ± {found.error:.2f} | {'yes' if found.holds else 'no'} |"
    )


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="names or folders")
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES), help="also w8a8-static, ...")
    runs = ", ".join(f'"{run.name}"' for run in RUNS)
    parser.add_argument("--run", nargs="+", default=["*"], help=f"these alone (fnmatch): {runs}")
    parser.add_argument("--images", type=int, default=64, help="images that are compared")
    parser.add_argument("--batch", type=int, default=8, help="images that are generated at once")
    parser.add_argument("--preset", default="quick", help="effort of calibration")
    parser.add_argument("--recorded", type=int, help="prompts of a calibration (the preset's own)")
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--work", type=Path, help="a folder that keeps the artifacts")
    parser.add_argument("--out", type=Path, help="append the JSON lines here; rows there are done")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure, print."""
    asked = parsed(words)
    torch.backends.cudnn.allow_tf32 = False  # what is compared is fp32
    print(markdown([row for name in asked.model for row in Study(name, asked).rows()]))


if __name__ == "__main__":
    main()
