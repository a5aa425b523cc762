"""The shipped kernels of a forecast: made from the demo models, and measured on them.

    python benchmarks/default_kernels.py --make                       # writes the file in assets/
    python benchmarks/default_kernels.py --count 8                    # on a CPU
    python benchmarks/default_kernels.py --count 64 --device cuda --batch 32 --out default.jsonl

--make: both demo models generate the first prompts of the list "default" at their own guidance, in
50 steps under each of the noise schedules in `NODES`. They predict v on a cosine schedule. One
equation gives an eps model and a flow model with the same images exactly: a sample with the same
noise in relation to the image is scaled, given to the model at its own timestep for that noise, and
    eps = sigma x + alpha v,    x0 = alpha x - sigma v,    u = eps - x0.
Of each prediction the kernel is the mean over schedules and models. --quick: all three of one run
on the cosine schedule; the equation is the same one there, its steps lie elsewhere.

Else: one JSON line a row as it goes and a table at the end. For each model and share of skipped
calls the kernel of the model itself, that of the other model (crossed), and the shipped one: median
PSNR to the full run at equal seeds over `--count` evaluation prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from diffusers import DDIMScheduler
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.schedules import MODELS, SEED, chip, surroundings
from tenuto.files import write_tensors
from tenuto.measure import psnr
from tenuto.model import denoiser_of
from tenuto.runtime import Patches, percentile
from tenuto.runtime.attachment import install
from tenuto.runtime.default_forecast import default_kernel_of
from tenuto.sampling import OutputKernel, sampler
from tenuto.sampling.loading import defaults, load

STEPS = 50
FILE = Path(__file__).resolve().parent.parent / "assets" / "forecast-default.safetensors"
COSINE, LINEAR = "cosine", "scaled-linear betas 0.00085 to 0.012"
NODES = {  # prediction: the noise schedules that it is recorded under
    "v": (COSINE,),
    "eps": (LINEAR,),
    "flow": ("flow, shift 2",),
}


def noise(schedule: str) -> Tensor:
    """sigma / alpha at the steps of a schedule, falling: float64 (STEPS,)."""
    if schedule.startswith("flow"):
        shift, even = float(schedule.split()[-1]), torch.linspace(1, 0.005, STEPS).double()
        share = shift * even / (1 + (shift - 1) * even)
        return share / (1 - share).clamp_min(1e-6)
    if schedule == COSINE:
        known = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    else:
        known = DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ).alphas_cumprod
    kept = known.double()[torch.linspace(999, 0, STEPS).round().long()]
    return ((1 - kept) / kept).sqrt()


class Nodes(DDIMScheduler):
    """DDIM through given noise levels, not through steps of its own; it keeps what it saw."""

    ratio: Tensor  # sigma / alpha, falling
    seen: list[tuple[Tensor, Tensor]]  # (sample, output) of every step

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """The timesteps of the model at which its samples have that noise."""
        kept = self.alphas_cumprod.double()
        own = ((1 - kept) / kept).sqrt().atan()
        wanted = self.ratio.atan().clamp(own[0], own[-1])
        right = torch.searchsorted(own, wanted).clamp(1, len(own) - 1)
        share = (wanted - own[right - 1]) / (own[right] - own[right - 1])
        self.num_inference_steps, self.seen = len(wanted), []
        self.timesteps = (right - 1 + share).float().to(device)
        self.angles = torch.cat([wanted, wanted.new_zeros(1)]).to(device)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any
    ) -> Any:
        """One step of the solver."""
        place = len(self.seen)
        self.seen.append((sample.cpu().double(), model_output.cpu().double()))
        now, after = self.angles[place], self.angles[place + 1]
        x0 = now.cos() * sample - now.sin() * model_output
        eps = now.sin() * sample + now.cos() * model_output
        return ((after.cos() * x0 + after.sin() * eps).to(sample.dtype),)


def recorded(pipe: Any, schedule: str, predictions: list[str], count: int) -> dict[str, Any]:
    """The kernel of each prediction along one run of a demo model."""
    known = defaults(pipe)
    before, scheduler = pipe.scheduler, cast(Any, Nodes).from_config(pipe.scheduler.config)
    scheduler.ratio = noise(schedule)
    pipe.scheduler = scheduler
    try:
        lines = tuple(tn.prompts("default")[:count])
        sample = sampler(pipe, lines, STEPS, known.guidance, "latent")
        with torch.no_grad():
            sample(denoiser_of(pipe), 0, count)
    finally:
        pipe.scheduler = before
    angles, found = scheduler.angles[:-1].cpu(), {}
    for prediction in predictions:
        rows = []
        for angle, (x, v) in zip(angles, scheduler.seen, strict=True):
            eps, x0 = angle.sin() * x + angle.cos() * v, angle.cos() * x - angle.sin() * v
            rows.append({"v": v, "eps": eps, "flow": eps - x0}[prediction].flatten())
        stacked = torch.stack(rows)
        values = stacked @ stacked.T / stacked.shape[1]
        found[prediction] = kernel(values, angles, prediction, count)
    return found


def kernel(values: Tensor, angles: Tensor, prediction: str, images: int) -> OutputKernel:
    """A kernel whose "timesteps" are the angles of the noise, atan(sigma / alpha)."""
    alpha, sigma = angles.cos(), angles.sin()
    if prediction == "flow":
        alpha, sigma = alpha / (alpha + sigma), sigma / (alpha + sigma)
    times, alphas, sigmas = (tuple(x.tolist()) for x in (angles, alpha, sigma))
    return OutputKernel(values, times, alphas, sigmas, prediction, images)


def make(args: argparse.Namespace) -> None:
    """Record, take the mean, write the file."""
    pipes = {model: load(f"demo:{model}", args.device) for model in MODELS}
    nodes = dict.fromkeys(NODES, (COSINE,)) if args.quick else NODES
    kept: dict[str, list[OutputKernel]] = {prediction: [] for prediction in nodes}
    for model, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        for schedule in dict.fromkeys(s for found in nodes.values() for s in found):
            wanted = [p for p, schedules in nodes.items() if schedule in schedules]
            for prediction, found in recorded(pipe, schedule, wanted, args.recorded).items():
                kept[prediction].append(found)
                print(model, schedule, prediction, flush=True)
    tensors, about = {}, {}
    for prediction, kernels in kept.items():
        first = kernels[0]
        like = [k.at(first.timesteps).values for k in kernels]
        values = torch.stack(like).mean(0)
        tensors[prediction] = (values + values.T) / 2
        about[prediction] = first.about() | {
            "images": sum(k.images for k in kernels), "schedules": list(nodes[prediction]),
        }  # fmt: skip
    origin = {
        "made_by": "benchmarks/default_kernels.py --make",
        "models": {f"demo:{m}": {"guidance": defaults(p).guidance} for m, p in pipes.items()},
        "data": "Tiny-ImageNet-200, 64 x 64, in one autoencoder's latents of unit variance",
        "trained": "v-prediction on a cosine schedule; eps and flow are the same models rewritten",
        "prompts": f"the first {args.recorded} of the list default",
    }
    text = json.dumps({"kernels": about, "origin": origin}, sort_keys=True)
    write_tensors(FILE, tensors, {"tenuto-kernels": text})


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every model with every kernel at every share."""
    pipes = {model: load(f"demo:{model}", args.device) for model in MODELS}
    own = {model: kernel_of_run(pipe, args.recorded) for model, pipe in pipes.items()}
    for model, pipe in pipes.items():
        other = next(name for name in MODELS if name != model)
        kernels = {"own": own[model], "crossed": own[other], "shipped": default_kernel_of(pipe)}
        full = images(pipe, args)
        for share in args.shares:
            for name, known in kernels.items():
                speedup = math.floor(1e4 / (1 - share)) / 1e4
                with install(pipe, Patches(kernel=known, speedup=speedup)) as attached:
                    found = images(pipe, args)
                    said = attached.forecast() or {}
                db = psnr(full, found).tolist()
                yield {
                    "model": model, "kernel": name, "share": share, "count": args.count,
                    "psnr": median(db), "psnr_5": percentile(db, 5),
                    "predicted": said["predicted_db"], "skipped": said["skipped"],
                    "recorded": args.recorded, "chip": chip(pipe.device),
                } | surroundings()  # fmt: skip


def kernel_of_run(pipe: Any, count: int) -> OutputKernel:
    """Of a demo model's usual run."""
    known = defaults(pipe)
    found = tn.record(
        pipe, tn.prompts("default")[:count], steps=known.steps, guidance=known.guidance, batch=count
    ).kernel
    assert found is not None
    return found


def images(pipe: Any, args: argparse.Namespace) -> Tensor:
    """Of the evaluation prompts, on the CPU."""
    known, found = defaults(pipe), []
    sample = sampler(pipe, tuple(tn.prompts("evaluation")), known.steps, known.guidance)
    with torch.no_grad():
        for start in range(SEED, SEED + args.count, args.batch):
            size = min(args.batch, SEED + args.count - start)
            found.append(sample(denoiser_of(pipe), start, size).clamp(-1, 1).cpu())
    return torch.cat(found)


def markdown(found: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = ["| model | skipped | kernel | PSNR (5th) | predicted |", "|" + " --- |" * 5]
    for r in found:
        lines.append(
            f"| {r['model']} | {r['share']:.0%} | {r['kernel']} | {r['psnr']:.1f} "
            f"({r['psnr_5']:.1f}) | {r['predicted']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line; make or measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--make", action="store_true", help="write the file in assets/")
    parser.add_argument("--quick", action="store_true", help="make: all of one run, on the cosine")
    parser.add_argument("--recorded", type=int, default=4, help="images that a kernel is of")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.5, 0.6])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    if args.make:
        make(args)
        return
    found = []
    for row in rows(args):
        found.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print("\n" + markdown(found))


if __name__ == "__main__":
    main()
