"""Speed of attached models on a GPU beside bf16 and other libraries: models with random weights.

    python benchmarks/gpu_speed.py [--models dit2 dit16 sdxl klein] [--ways ...] [--out FILE.json]

Every way runs in a process of its own on the same card, one after another; a row that the file has
already is not measured again, but for those that failed. A row has the median of 20 denoiser calls
with quartiles in ms, the times of the first call and of the first five (compile, capture, choice of
kernels) and the peak memory. Weights are random: only time and memory mean anything. "run" is a
step of a whole run of 20 with its scheduler, the mean; "forecast": half of its calls are skipped.
Rows of torchao, SDNQ and
cache-dit say "not installed" where they are not. `--quick`: four rows in two minutes.
`--models tiny --device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))

from gpu_models import MAKE, MODELS, made
from gpu_runs import STEPS, Loop
from gpu_ways import BASE, COMPILED, RUNS, WAYS, missing

import tenuto as tn
from tenuto.model import describe, patch_of
from tenuto.runtime.timing import percentile

CALLS = 20
QUICK = (BASE, "bf16 graph", "bf16 blocks, graph", "w8a8 int8 graph")


def called(
    model: str, way: str, denoiser: nn.Module, inputs: dict[str, Any]
) -> tuple[Callable[[], Any], int]:
    """What is timed, and how many steps that is: one call, or a run of `STEPS`."""
    if way in RUNS:
        loop = Loop(model, denoiser, inputs)
        RUNS[way](loop)
        return loop, STEPS
    changed = WAYS[way](denoiser)
    return lambda: changed(**inputs, return_dict=False)[0], 1


def row(model: str, way: str, device: str, calls: int) -> dict[str, Any]:
    """One row, measured in this process."""
    denoiser, inputs = made(model, device)
    cuda, blocks = device == "cuda", len(describe(denoiser).blocks)
    call, share = called(model, way, denoiser, inputs)

    def timed() -> float:
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.no_grad():
        first = [timed() for _ in range(5 if share == 1 else 3)]
        found = [timed() * 1e3 / share for _ in range(calls if share == 1 else 6)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    card = torch.cuda.get_device_name() if cuda else "cpu"
    middle = {f"q{q}": round(percentile(found, q), 3) for q in (25, 50, 75)}
    return {
        "model": model, "way": way, **middle, "first_s": round(first[0], 2),
        "firsts_s": round(sum(first), 1), "GiB": round(peak, 2), "blocks": blocks, "card": card,
        "torch": torch.__version__, **facts(denoiser),
    }  # fmt: skip


def facts(denoiser: nn.Module) -> dict[str, Any]:
    """What was executed: how many graphs, why none, how the layers compute."""
    around = getattr(patch_of(vars(denoiser).get("forward")), "call", None)
    graphs = getattr(around, "graphs", None)
    found = {} if graphs is None else {"graphs": len(graphs.known), "why": graphs.reason}
    layers = [m for m in denoiser.modules() if isinstance(m, tn.runtime.QLayer)]
    words = [layer.execution for layer in layers]
    return found | {"layers": {word: words.count(word) for word in sorted(set(words))}}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a way, beside bf16 eager and the best compiled bf16 of the same model."""
    head = ("model", "way", "ms (quartiles)", "x eager", "x best compile")
    head += ("first call, s", "first five, s", "GiB")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for r in rows:
        same = [o for o in rows if o["model"] == r["model"] and "q50" in o]
        of = "run: " * (r["way"] in RUNS)
        base = [o["q50"] for o in same if o["way"] == of + BASE]
        best = [o["q50"] for o in same if o["way"] in (of + way for way in COMPILED)]
        if "q50" not in r:
            cells = [r["error"][:60], *[""] * 5]
        else:
            ratios = [f"{min(b) / r['q50']:.2f}" if b else "" for b in (base, best)]
            middle = f"{r['q50']:.2f} ({r['q25']:.2f}-{r['q75']:.2f})"
            cells = [middle, *ratios, *(str(r[name]) for name in ("first_s", "firsts_s", "GiB"))]
        lines.append(f"| {r['model']} | {r['way']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def child(model: str, way: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row, measured in a process of its own."""
    gone = missing(way)
    if gone:
        return {"model": model, "way": way, "error": f"not installed: {', '.join(gone)}"}
    command = [sys.executable, __file__, "--one", model, way, "--device", args.device]
    fresh = os.environ | {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}  # first calls compile every time
    command += ["--calls", str(args.calls)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=args.limit, env=fresh
        )
    except subprocess.TimeoutExpired:
        return {"model": model, "way": way, "error": f"took more than {args.limit:.0f} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        tail = done.stderr.strip().splitlines()[-1:] or ["no output"]
        sys.stderr.write(done.stderr[-3000:])
        return {"model": model, "way": way, "error": tail[0]}
    return json.loads(found[-1])


def asked() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MAKE))
    parser.add_argument("--ways", nargs="+", default=[*WAYS, *RUNS], choices=[*WAYS, *RUNS])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("gpu_speed.json"))
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a row")
    parser.add_argument("--calls", type=int, default=CALLS, help="timed a row")
    parser.add_argument("--quick", action="store_true", help="DiT-XL/2 at batch 2, four ways")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.ways, args.limit = list(QUICK), 60.0
        args.models = args.models if args.models != list(MODELS) else ["dit2"]
    return args


def main() -> None:
    args = asked()
    if args.one:
        model, way = args.one
        print(json.dumps(row(model, way, args.device, args.calls)))
        return
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    rows = {(r["model"], r["way"]): r for r in rows if "q50" in r}
    for model in args.models:
        for way in args.ways:
            if (model, way) in rows:
                continue
            rows[model, way] = child(model, way, args)
            print(json.dumps(rows[model, way]), flush=True)
            part = args.out.with_suffix(".part")
            part.write_text(json.dumps(list(rows.values()), indent=1))
            part.replace(args.out)
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
