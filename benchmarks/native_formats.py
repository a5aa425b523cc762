"""The numbers of files that other programs read: rounded to nearest, and calibrated, side by side.

    python benchmarks/native_formats.py [--count 64] [--preset quick] [--rows "comfy-w4a8*"]
    python benchmarks/native_formats.py --model demo:unet --device cuda --batch 32 --out r.jsonl \
        --fid 10000 --data DATA --features inception.safetensors
    python benchmarks/native_formats.py --model FOLDER     # of assets/train.py denoiser --flow

One JSON line a row as it goes, a Markdown table at the end; a row that OUT has is not made again.
Output error: |y' - y|^2 / |y|^2 of the denoiser's outputs y over all calls of evaluation prompts,
each with the inputs of full precision, y' with weights and inputs in the format. PSNR: of images at
equal seeds to those in full precision. Bits: stored for each weight that is quantized, scales and
steps included. Where comfy-kitchen is installed its own W4A8 is a row: codes and scales as that
makes them, without data. fp8: with a range a token, and with one stored range of the inputs, which
is what `input_scale` of a file is. FID and KID: of `--fid` images against the real ones in DATA.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.flow_demo import trained_flow
from benchmarks.joint import far
from benchmarks.quality import emit, known
from benchmarks.quantization import FIRST_SEED, draw
from benchmarks.schedules import chip, surroundings
from tenuto.calibration import effort, recipe_for
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.calibration.result_check import answer
from tenuto.measure import psnr
from tenuto.model import denoiser_of, device_and_dtype
from tenuto.numerics import Format, QTensor, native
from tenuto.runtime import percentile
from tenuto.sampling import sampler
from tenuto.sampling.loading import defaults, load, prompts

_INPUTS = Format(dtype="e4m3", granularity="tensor")
ONE_RANGE = replace(tn.schemes.FP8_STATIC, name="fp8-file", activation=_INPUTS)
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
    yield "fp8, a range a token", recipe_for(s.FP8, backbone)
    yield "fp8, one stored range", recipe_for(ONE_RANGE, backbone)
    yield "w4a8 of Tenuto, nearest", recipe_for(s.W4A8, backbone, nearest)
    yield "w4a8 of Tenuto, GPTQ", recipe_for(s.W4A8, backbone, gptq)


@torch.no_grad()
def outputs(denoiser: nn.Module, recorded: tn.Trajectory) -> list[Tensor]:
    """The denoiser's output at each recorded call, on the CPU."""
    device = str(device_and_dtype(denoiser)[0])
    found = (answer(denoiser, call, device) for call in recorded.calls)
    return [part.double().cpu() for parts in found for part in parts]


def bits(artifact: tn.Artifact) -> float:
    """Stored bits for each quantized weight."""
    count = sum(torch.Size(facts["shape"]).numel() for facts in artifact.header["layers"].values())
    return 8 * sum(t.nbytes for t in artifact.section("weights").values()) / count


def opened(args: argparse.Namespace) -> Any:
    """The pipeline; one of flow matching gets a scheduler that it can call."""
    folder = Path(args.model)
    pipe = trained_flow(folder, args.device) if folder.is_dir() else load(args.model, args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every row, from the file where it has it."""
    pipe, kind = opened(args), effort(args.preset)
    (steps, guidance), denoiser = defaults(args.model), denoiser_of(pipe)
    run = {"steps": steps, "guidance": guidance, "batch": kind.batch}
    trajectory = tn.record(pipe, prompts("default")[: kind.prompts], **run)
    evaluation = prompts("evaluation")
    others = tn.record(pipe, evaluation[: args.prompts], seed=FIRST_SEED, **run)
    exact = outputs(denoiser, others)
    sample, done = sampler(pipe, tuple(evaluation), steps, guidance), known(args.out)
    reference, _ = draw(sample, denoiser, args.count, args.batch)
    for name, recipe in recipes(denoiser, args.preset):
        about = {
            "model": args.model, "row": name, "preset": args.preset, "seed": args.seed,
            "count": args.count, "prompts": args.prompts, "fid_images": args.fid,
            "execution": args.execution, "chip": chip(pipe.device),
        }  # fmt: skip
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in args.rows):
            continue
        row = done.get(json.dumps(about, sort_keys=True))
        if row is None:
            began = time.perf_counter()
            options: dict[str, Any] = {"preset": args.preset, "seed": args.seed, "measure": False}
            artifact = tn.quantize(pipe, recipe, trajectory, **options)
            seconds = time.perf_counter() - began
            with tn.attach(pipe, artifact, execution=args.execution, speedup=1) as attached:
                found = outputs(denoiser, others)
                images, _ = draw(sample, denoiser, args.count, args.batch)
                mode = attached.execution()["mode"]
                distance = far(pipe, args) if args.fid else {}
            values = psnr(images, reference).tolist()
            wrong = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
            row = {"key": about} | about | {
                "output_error": wrong / sum(float(y.square().sum()) for y in exact),
                "psnr_median_db": percentile(values, 50), "psnr_p5_db": percentile(values, 5),
                "bits": bits(artifact), "mode": mode, "seconds": seconds,
            } | distance | surroundings()  # fmt: skip
            emit(row, args.out)
        yield row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = "| model | numbers, rounding | bits | output error | PSNR dB, median (5th) | FID | KID |"
    lines = [head, "|" + " --- |" * 7]
    for r in rows:
        db = f"{r['psnr_median_db']:.2f} ({r['psnr_p5_db']:.2f})"
        near = " | ".join(f"{r[k]:.2f}" if k in r else "-" for k in ("fid", "kid_x1000"))
        name = Path(r["model"]).name
        lines.append(
            f"| {name} | {r['row']} | {r['bits']:.2f} | {r['output_error']:.2e} | {db} | {near} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo:transformer")
    parser.add_argument("--count", type=int, default=8, help="images a row")
    parser.add_argument("--prompts", type=int, default=4, help="of the output error")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--execution", default="int8", help='as of attach: "int8", "float"')
    parser.add_argument("--fid", type=int, default=0, help="images for FID and KID; 0: neither")
    parser.add_argument("--fid-batch", type=int, default=500)
    parser.add_argument("--data", type=Path, help="a folder with val*.npz and classes.json")
    parser.add_argument("--features", type=Path, help="what convert_inception.py made")
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--rows", nargs="*", default=["*"], help="names of rows to make (fnmatch)")
    args = parser.parse_args()
    if args.fid and None in (args.data, args.features):
        parser.error("FID needs --data and --features.")
    torch.backends.cudnn.allow_tf32 = False
    rows = list(measured(args))
    print(f"\n{args.count} images, preset {args.preset}; {rows[0]['chip']}, torch "
          f"{torch.__version__}\n\n{markdown(rows)}")  # fmt: skip


if __name__ == "__main__":
    main()
