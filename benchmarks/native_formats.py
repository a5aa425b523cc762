"""The numbers of files that other programs read: rounded to nearest, and calibrated, side by side.

    python benchmarks/native_formats.py [--count 64] [--preset quick] [--rows "comfy-w4a8*"]

Prints one JSON line a row as it goes and a Markdown table at the end. Output error: |y' - y|^2 /
|y|^2 of the denoiser's outputs y over all calls of held-out prompts, each with the inputs of full
precision, y' with weights and inputs in the format. PSNR: of pictures at equal seeds to those in
full precision. Bits: stored for each weight that is quantized, scales and steps included. Where
comfy-kitchen is installed its own W4A8 is a row: codes and scales as that makes them, without data.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from quantization import FIRST_SEED, cpu_name, draw
from torch import Tensor, nn

import tenuto as tn
from tenuto.calibration import effort, recipe_for
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.calibration.result_check import answer
from tenuto.measure import psnr
from tenuto.model import denoiser_of
from tenuto.numerics import Format, QTensor, native
from tenuto.runtime import percentile
from tenuto.sampling import sampler
from tenuto.sampling.loading import defaults, load, prompts

KITCHEN = "comfy_kitchen.backends.eager.w4a8_int8"


@dataclass(frozen=True)
class Kitchen(RoundToNearest):
    """What comfy-kitchen makes of a weight, by itself."""

    def weight(self, weight: Tensor, form: Format) -> QTensor:
        """One weight (N, K): the same layout, and its own scales and codes."""
        facts = native.named("asym_w4a8_int8").facts(QTensor.nearest(weight, form))
        sizes = {key: facts[key] for key in ("group_size", "convrot_groupsize")}
        made = importlib.import_module(KITCHEN).quantize_w4a8_int8_weight(weight.float(), **sizes)
        names = ("weight", "weight_s_rel", "weight_s_channel", "", "weight_codebook")
        tensors = {name: t for name, t in zip(names, made, strict=True) if name}
        return native.named(facts["format"]).unpack(tensors, facts, weight.shape, form)


def recipes(model: nn.Module, preset: str) -> Iterator[tuple[str, tn.Recipe]]:
    """(name, recipe) of every row."""
    backbone, s = tn.describe(model), tn.schemes
    nearest, gptq = RoundToNearest(), effort(preset).rounding("gptq")
    covering = replace(s.COMFY_W4A8, weight=replace(s.COMFY_W4A8.weight, ranges="minmax"))
    if importlib.util.find_spec("comfy_kitchen"):
        yield "comfy-w4a8, as comfy-kitchen makes it", recipe_for(s.COMFY_W4A8, backbone, Kitchen())
    yield "comfy-w4a8, nearest, no search", recipe_for(covering, backbone, nearest)
    yield "comfy-w4a8, nearest", recipe_for(s.COMFY_W4A8, backbone, nearest)
    yield "comfy-w4a8, GPTQ", recipe_for(s.COMFY_W4A8, backbone, gptq)
    yield "comfy-int8, nearest", recipe_for(s.COMFY_INT8, backbone)
    yield "comfy-w6a8, nearest", recipe_for(s.COMFY_W6A8, backbone, nearest)
    yield "comfy-w6a8, GPTQ", recipe_for(s.COMFY_W6A8, backbone, gptq)
    yield "nvfp4, nearest", recipe_for(s.NVFP4, backbone, nearest)
    yield "nvfp4, GPTQ", recipe_for(s.NVFP4, backbone, gptq)
    yield "w4a8 of Tenuto, nearest", recipe_for(s.W4A8, backbone, nearest)
    yield "w4a8 of Tenuto, GPTQ", recipe_for(s.W4A8, backbone, gptq)


@torch.no_grad()
def outputs(denoiser: nn.Module, held_out: tn.Trajectory) -> list[Tensor]:
    """The denoiser's output at each recorded call."""
    found = (answer(denoiser, call, "cpu") for call in held_out.calls)
    return [part.double() for parts in found for part in parts]


def bits(artifact: tn.Artifact) -> float:
    """Stored bits for each quantized weight."""
    count = sum(torch.Size(facts["shape"]).numel() for facts in artifact.header["layers"].values())
    return 8 * sum(t.nbytes for t in artifact.section("weights").values()) / count


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every row."""
    pipe, kind = load(args.model), effort(args.preset)
    (steps, guidance), denoiser = defaults(args.model), denoiser_of(pipe)
    run = {"steps": steps, "guidance": guidance, "batch": kind.batch}
    trajectory = tn.record(pipe, prompts("default")[: kind.prompts], **run)
    evaluation = prompts("evaluation")
    held_out = tn.record(pipe, evaluation[: args.held_out], seed=FIRST_SEED, **run)
    exact = outputs(denoiser, held_out)
    sample = sampler(pipe, tuple(evaluation), steps, guidance)
    reference, _ = draw(sample, denoiser, args.count, args.batch)
    for name, recipe in recipes(denoiser, args.preset):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in args.rows):
            continue
        began = time.perf_counter()
        options: dict[str, Any] = {"preset": args.preset, "seed": args.seed, "measure": False}
        artifact = tn.quantize(pipe, recipe, trajectory, **options)
        seconds = time.perf_counter() - began
        with tn.attach(pipe, artifact, execution="int8", speedup=1) as attached:
            found = outputs(denoiser, held_out)
            pictures, _ = draw(sample, denoiser, args.count, args.batch)
            mode = attached.execution()["mode"]
        values = psnr(pictures, reference).tolist()
        wrong = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
        facts = {
            "row": name, "output_error": wrong / sum(float(y.square().sum()) for y in exact),
            "psnr_median_db": percentile(values, 50), "psnr_p5_db": percentile(values, 5),
            "bits": bits(artifact), "execution": mode, "seconds": seconds,
        }  # fmt: skip
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
        yield facts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo:transformer")
    parser.add_argument("--count", type=int, default=8, help="pictures a row")
    parser.add_argument("--held-out", type=int, default=4, help="prompts of the output error")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*", default=["*"], help="names of rows to make (fnmatch)")
    args = parser.parse_args()
    rows = list(measured(args))
    print(f"\n{args.model}, {args.count} prompts, preset {args.preset}; {cpu_name()}, ", end="")
    print(f"torch {torch.__version__}, {datetime.date.today()}\n")
    print("| numbers, rounding | bits | output error | PSNR dB, median (5th percentile) "
          "| execution | s to quantize |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- |")
    for r in rows:
        db = f"{r['psnr_median_db']:.2f} ({r['psnr_p5_db']:.2f})"
        print(
            f"| {r['row']} | {r['bits']:.2f} | {r['output_error']:.2e} | {db} "
            f"| {r['execution']} | {r['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
