"""What skipping half of the calls saves on this machine, and what planning and calibrating take.

    python benchmarks/forecast_time.py                      # both demo models, on a CPU, minutes
    python benchmarks/forecast_time.py --device cuda --images 8

Full runs and runs with half of the calls take turns. *Sampling* is an image without text encoder
and decoder, *pipeline* with them: the ratio is the median over turns, with quartiles. *Planning* is
what a run begins with where no plan is known for its steps. *Calibrating* is recording as many
images as a forecast needs and measuring it on four others, as `quantize` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.schedules import MODELS, chip, surroundings
from tenuto.artifact import Artifact
from tenuto.caching import Forecast
from tenuto.calibration.forecast_scores import with_scores
from tenuto.model import denoiser_of, watched
from tenuto.runtime import percentile
from tenuto.sampling import OutputKernel, sampler
from tenuto.sampling.loading import defaults, load

RECORDED = 8  # images
LONG = 50  # steps of the longest run that is planned


class Stopwatch:
    """Seconds of a pipeline's text encoder and decoder, and computed calls of the denoiser."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.calls, self.began = device, 0.0, 0, 0.0

    def now(self) -> float:
        """Seconds, of everything that was started."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reset(self) -> None:
        """Begin anew."""
        self.seconds, self.calls = 0.0, 0

    def called(self, *_: Any) -> None:
        """A call of the denoiser computes."""
        self.calls += 1

    def begin(self, *_: Any) -> None:
        """Another part begins."""
        self.began = self.now()

    def end(self, *_: Any) -> None:
        """It has ended."""
        self.seconds += self.now() - self.began


@contextmanager
def stopwatch(pipe: Any) -> Iterator[Stopwatch]:
    """One on a pipeline, for a while."""
    found, denoiser = Stopwatch(pipe.device), denoiser_of(pipe)
    inside = (name for name, m in denoiser.named_modules() if isinstance(m, nn.Conv2d))
    with (
        watched(denoiser, [next(inside)], before=found.called),  # once in a call that computes
        watched(pipe.text_encoder, before=found.begin, after=found.end),
        watched(pipe.vae, ["decoder"], before=found.begin, after=found.end),
    ):
        yield found


def image(pipe: Any, watch: Stopwatch, model: str, images: int, seed: int) -> tuple[float, float]:
    """Seconds an image: the whole pipeline, and its sampling alone."""
    known, lines = defaults(f"demo:{model}"), tuple(tn.prompts("evaluation"))
    sample = sampler(pipe, lines, known.steps, known.guidance)
    watch.reset()
    began = watch.now()
    sample(denoiser_of(pipe), seed, images)
    whole = watch.now() - began
    return whole / images, (whole - watch.seconds) / images


def saved(pipe: Any, model: str, images: int, turns: int) -> Iterator[dict[str, Any]]:
    """A row for sampling and one for the whole pipeline."""
    ways, found, calls = {"full": None, "half": 2.0}, {"full": [], "half": []}, {}
    for turn in range(turns + 1):
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            speedup = ways[way]
            used = tn.attach(pipe, speedup=speedup) if speedup else nullcontext()
            with used, stopwatch(pipe) as watch:
                pair = image(pipe, watch, model, images, 1_000 + turn)
                calls[way] = watch.calls
            if turn:  # the first one of each warms up
                found[way].append(pair)
    for place, what in ((1, "sampling"), (0, "pipeline")):
        one, two = ([pair[place] for pair in found[way]] for way in ("full", "half"))
        ratios = [a / b for a, b in zip(one, two, strict=True)]
        yield {
            "model": model, "what": what, "images": images, "turns": turns, "calls": calls,
            "full_s": percentile(one, 50), "half_s": percentile(two, 50),
            "ratio": [percentile(ratios, p) for p in (25, 50, 75)],
        }  # fmt: skip


def planned(kernel: OutputKernel, steps: int, seconds: int = 9) -> float:
    """Seconds that a plan takes which nobody made before, median."""
    first, last = kernel.timesteps[0], kernel.timesteps[-1]
    found = []
    for turn in range(seconds):
        end = last + 1e-3 * turn  # other steps, so that none is known
        times = torch.linspace(first, end, steps, dtype=torch.float64).tolist()
        began = time.perf_counter()
        Forecast(kernel, 2.0).plan(times)
        found.append(time.perf_counter() - began)
    return percentile(found, 50)


def calibrated(pipe: Any, model: str) -> tuple[OutputKernel, dict[str, Any]]:
    """The kernel of a recording, and how long that and measuring took."""
    known, began = defaults(f"demo:{model}"), time.perf_counter()
    lines = tn.prompts("default")[:RECORDED]
    found = tn.record(pipe, lines, steps=known.steps, guidance=known.guidance, batch=RECORDED)
    assert found.kernel is not None, "the demo models' schedulers have one"
    artifact = Artifact.new(pipe, found.schedule()).add_forecast(found.kernel)
    recorded = time.perf_counter()
    with_scores(pipe, artifact, found)
    ended = time.perf_counter()
    return found.kernel, {
        "model": model, "what": "calibrating", "images": RECORDED,
        "record_s": recorded - began, "measure_s": ended - recorded,
    }  # fmt: skip


def main() -> None:
    """Print a JSON line a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="all", choices=("all", *MODELS))
    parser.add_argument("--images", type=int, default=1, help="images at once")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for model in MODELS if args.model == "all" else (args.model,):
        pipe = load(f"demo:{model}", args.device)
        pipe.set_progress_bar_config(disable=True)
        about = surroundings() | {"chip": chip(pipe.device)}
        with torch.no_grad():
            for row in saved(pipe, model, args.images, args.turns):
                print(json.dumps(row | about), flush=True)
            kernel, row = calibrated(pipe, model)
        print(json.dumps(row | about), flush=True)
        for steps in (20, LONG):
            row = {"model": model, "what": "planning", "steps": steps}
            print(json.dumps(row | {"seconds": planned(kernel, steps)} | about), flush=True)


if __name__ == "__main__":
    main()
