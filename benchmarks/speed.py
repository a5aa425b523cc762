"""Speed of W8A8 (a range per token) beside bf16 and fp32, on one denoiser call and on pictures.

    python benchmarks/speed.py [--model all] [--pictures 2 16] [--device cuda] [--compile]

Prints one JSON line a row as it goes and a Markdown table at the end. Guidance doubles the rows of
a call: 2 pictures are 4 rows. All ways take turns, every other time backwards; a row has the median
seconds with quartiles, and how many times as fast as bf16 eager it is, the median of ratios turn by
turn. The row to compare with bf16 is W8A8 in a bf16 model. "int8": every layer that a kernel takes;
"auto": `attach` as it is by default, which times each layer first. Seconds a picture are those of
the whole pipeline, text encoder and decoder in fp32 included. `--compile` adds bf16 under
torch.compile, which needs a C++ compiler on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.quantization import cpu_name, wanted
from tenuto.calibration import effort
from tenuto.measure import bf16_arithmetic, bf16_copy, first_call
from tenuto.model import denoiser_of, device_and_dtype
from tenuto.runtime import Latency, QLayer, latency, quantized
from tenuto.sampling import sampler
from tenuto.sampling.loading import defaults, load, prompts

MODELS = ("transformer", "unet")
SEED = 10_000
BASE = "bf16 eager"


def ways(denoiser: nn.Module, artifact: tn.Artifact, compiled: bool) -> dict[str, nn.Module]:
    """Denoisers by name; those in bf16 take and give what the fp32 one does."""
    arithmetic = bf16_arithmetic(device_and_dtype(denoiser)[0])

    def low(execution: str) -> nn.Module:
        return bf16_copy(quantized(denoiser, artifact, execution=execution).denoiser)

    found = {"fp32 eager": denoiser, BASE: bf16_copy(denoiser, arithmetic)}
    found |= {f"W8A8 in bf16, {how}": low(how) for how in ("int8", "auto")}
    for how in ("int8", "auto"):
        found[f"W8A8 in fp32, {how}"] = quantized(denoiser, artifact, execution=how).denoiser
    if compiled:
        found["bf16 compiled"] = bf16_copy(denoiser, arithmetic)
        found["bf16 compiled"].compile()
    return found


def calls(found: dict[str, nn.Module], call: tuple[Any, Any]) -> dict[str, Callable[[], Any]]:
    """One denoiser call each, of the same arguments."""
    args, kwargs = call
    return {name: lambda d=d: d(*args, **kwargs) for name, d in found.items()}


def pictures(
    found: dict[str, nn.Module], sample: Any, count: int
) -> dict[str, Callable[[], Tensor]]:
    """Drawing `count` pictures in one batch."""
    return {name: lambda d=d: sample(d, SEED, count) for name, d in found.items()}


def rows(args: argparse.Namespace, model: str) -> Iterator[dict[str, Any]]:
    """Every row of one model."""
    pipe = load(f"demo:{model}", args.device)
    denoiser, (steps, guidance) = denoiser_of(pipe).eval().requires_grad_(False), defaults(pipe)
    kind = effort("quick")
    trajectory = tn.record(
        pipe, prompts("default")[: kind.prompts], steps=steps, guidance=guidance, batch=kind.batch
    )
    artifact = tn.quantize(pipe, tn.schemes.W8A8, trajectory)
    found = ways(denoiser, artifact, args.compile)
    found = {name: way for name, way in found.items() if name == BASE or wanted(name, args.rows)}
    sample = sampler(pipe, prompts("evaluation"), steps, guidance)
    for count in args.pictures:
        call, _ = first_call(denoiser, sample, SEED, count, whole=False)
        timed = latency(calls(found, call), args.repeats, warmup=3)
        yield from (row(model, count, "denoiser call", n, timed, 1) for n in found)
        if args.drawn:
            timed = latency(pictures(found, sample, count), args.drawn)
            yield from (row(model, count, "picture", n, timed, count) for n in found)
    for name, way in found.items():
        note(f"{model}, {name}: {layers_of(way)}")


def row(
    model: str, count: int, what: str, name: str, timed: dict[str, Latency], share: int
) -> dict[str, Any]:
    """One line of the table; seconds of a call, or a picture."""
    mine, ratio = timed[name], timed[BASE].over(timed[name])
    facts = {
        "model": model,
        "pictures": count,
        "what": what,
        "way": name,
        "seconds": round(mine.median / share, 5),
        "quartiles": [round(q / share, 5) for q in mine.quartiles],
        "times_as_fast_as_bf16_eager": round(ratio.median, 3),
        "ratio_quartiles": [round(q, 3) for q in ratio.quartiles],
        "runs": len(mine.seconds),
    }
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    return facts


def layers_of(denoiser: nn.Module) -> str:
    """How the quantized layers of a denoiser compute after all these calls."""
    count: dict[str, int] = {}
    for module in denoiser.modules():
        if isinstance(module, QLayer):
            count[module.execution] = count.get(module.execution, 0) + 1
    return ", ".join(f"{n} {how}" for how, n in count.items()) or "no quantized layers"


def note(text: str) -> None:
    """A word for who watches."""
    sys.stderr.write(text + "\n")


def markdown(found: list[dict[str, Any]]) -> Iterator[str]:
    """The table."""
    yield "| model | pictures | of | way | ms, median (quartiles) | × bf16 eager (quartiles) |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for r in found:
        low, high = (f"{1e3 * q:.1f}" for q in r["quartiles"])
        ratio = "{:.2f} ({:.2f}–{:.2f})".format(
            r["times_as_fast_as_bf16_eager"], *r["ratio_quartiles"]
        )
        yield (
            f"| {r['model']} | {r['pictures']} | {r['what']} | {r['way']} "
            f"| {1e3 * r['seconds']:.1f} ({low}–{high}) | {ratio} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="all", choices=("all", *MODELS))
    parser.add_argument("--pictures", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--repeats", type=int, default=15, help="runs of a denoiser call")
    parser.add_argument("--drawn", type=int, default=3, help="runs of drawing; 0 leaves it out")
    parser.add_argument("--rows", nargs="*", default=["*"], help="names of ways (fnmatch)")
    parser.add_argument("--device", default=None)
    parser.add_argument("--compile", action="store_true", help="bf16 under torch.compile too")
    args = parser.parse_args()
    with torch.no_grad():
        models = MODELS if args.model == "all" else (args.model,)
        found = [r for model in models for r in rows(args, model)]
    cuda = args.device is not None and args.device.startswith("cuda")
    chip = torch.cuda.get_device_name(args.device) if cuda else cpu_name()
    print(f"\n{chip}, {torch.get_num_threads()} threads, ", end="")
    print(f"torch {torch.__version__}, {datetime.date.today()}\n")
    print("\n".join(markdown(found)))


if __name__ == "__main__":
    main()
