"""Algorithms that round weights, and chains of them, beside rounding to nearest: LLMC's study.

    python benchmarks/llmc.py --encoder flan-t5-small minilm --model demo:unet --out llmc.jsonl
    python benchmarks/llmc.py --encoder smollm2-135m --blocks 4 --schemes w4a16-g64 --rows gptq

Folders of encoders are made by convert_t5.py, convert_minilm.py, convert_gguf.py, convert_nomic.py.
An encoder is calibrated on `--prompts` of the list "general" and measured on the quarter of it that
nothing uses: relative L2 of its states to full precision. What calibration made worse is not put
back, as `tenuto quantize` does it by further prompts: what is measured is the algorithm. `--blocks`
leaves the first ones alone, so that a large encoder is affordable. A denoiser is calibrated on
recorded runs of "default" and measured on runs of "evaluation": relative L2 of what it returns,
over all steps, first and last layers in 8 bits. Inputs are in 8 bits (a range a token) in w8a8 and
w4a8. dB: how much nearer than round-to-nearest. One JSON line a row; rows that `--out` has are not
made again, and a table follows of all that were asked for.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.encoders import ROWS, encoder_of
from benchmarks.quality import emit, known
from benchmarks.quantization import cpu_name
from tenuto.artifact import Artifact, fingerprint
from tenuto.calibration import algorithms, encoder_job, fill, recipe_for
from tenuto.calibration.algorithms import Effort
from tenuto.calibration.result_check import answer
from tenuto.measure import states_distance
from tenuto.model import denoiser_of, private_copy
from tenuto.numerics import Recipe, Scheme
from tenuto.resume import digest
from tenuto.runtime import encoder_layers
from tenuto.sampling import calls_of
from tenuto.sampling.loading import defaults, load

_W4, _W3 = tn.schemes.W4A16, replace(tn.schemes.W4A16.weight, bits=3)
SCHEMES: dict[str, Scheme] = {"w8a8": tn.schemes.W8A8, "w4a8": tn.schemes.W4A8} | {
    f"w4a16-g{g}": Scheme(f"w4a16-g{g}", replace(_W4.weight, group=g)) for g in (32, 64, 128)
} | {"w3a16-g64": Scheme("w3a16-g64", replace(_W3, group=64))}  # fmt: skip
CHAINS = (
    "awq+clip", "awq+gptq", "awq+omniquant", "clip+gptq", "clip+omniquant", "omniquant+gptq",
    "clip+omniquant+gptq", "awq+clip+gptq",
)  # fmt: skip
NEAREST, UNSEEN = "nearest", 1000  # the seed of the runs that a denoiser is measured on
Measured = Callable[[Scheme, str], dict[str, Any]]  # of a scheme and an algorithm


def rounding_names(part: str, patterns: list[str], scheme: Scheme) -> list[str]:
    """The algorithms and chains of them for such a part that are asked for, nearest first.

    A scale per column (AWQ's) is for weights whose inputs stay in float.
    """
    able = scheme.activation is None
    single = [n for n in algorithms.names(part) if able or not smooth(n, part)]
    chains = [chain for chain in CHAINS if all(name in single for name in chain.split("+"))]
    wanted = [n for n in (*single, *chains) if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    return [NEAREST, *(n for n in wanted if n != NEAREST)]


def smooth(name: str, part: str) -> bool:
    """Whether an algorithm scales the columns of weights."""
    return getattr(algorithms.by_name(name, part), "smooth", False)


def of_encoder(folder: Path, asked: argparse.Namespace) -> tuple[dict[str, Any], Measured]:
    """What a row of an encoder is known by, and how one is made."""
    encoder, rows = encoder_of(folder)
    if asked.blocks:
        first_blocks(encoder, asked.blocks)
    lines = tn.prompts("general")
    calls = calls_of(rows(lines[::2][: asked.prompts]), ROWS, by_length=True)
    unseen = calls_of(rows(lines[3::4]), ROWS)

    def made(scheme: Scheme, method: str) -> dict[str, Any]:
        if smooth(method, "encoder"):
            scheme = replace(scheme, weight=replace(scheme.weight, smooth=True))
        start = time.perf_counter()
        job = encoder_job(encoder, calls, scheme, method)
        seconds, artifact = time.perf_counter() - start, Artifact({"encoders": {}})
        fill(artifact, "text_encoder", encoder, job)
        layers = encoder_layers(encoder, artifact, "text_encoder")
        facts = states_distance(encoder, unseen, layers)
        return {"relative_l2": facts["relative_l2"], "cosine": facts["cosine"]["mean"],
                "bf16": facts["bf16"]["relative_l2"], "seconds": seconds}  # fmt: skip

    blocks = len(tn.describe(encoder).blocks)
    key = {"model": folder.name, "blocks": blocks, "weights": digest(fingerprint(encoder))}
    return key | {"prompts": asked.prompts}, made


def first_blocks(encoder: Any, count: int) -> None:
    """Leave only the first `count` blocks of an encoder: what is measured is their states."""
    place = tn.describe(encoder).blocks[0].rpartition(".")[0]
    owner, _, name = place.rpartition(".")
    setattr(encoder.get_submodule(owner), name, encoder.get_submodule(place)[:count])


def of_denoiser(name: str, asked: argparse.Namespace) -> tuple[dict[str, Any], Measured]:
    """What a row of a denoiser is known by, and how one is made."""
    pipe, (steps, guidance) = load(name, None), defaults(name)
    denoiser, how = denoiser_of(pipe), {"steps": asked.steps or steps, "guidance": guidance}
    demo, count = name.startswith("demo:"), asked.prompts
    lines = tn.prompts("default" if demo else "general")[:count]
    others = tn.prompts("evaluation" if demo else "captions")[:count]
    trajectory = tn.record(pipe, lines, batch=4, **how)
    unseen = tn.record(pipe, others, batch=4, seed=UNSEEN, **how).calls
    backbone, full = tn.describe(denoiser), private_copy(denoiser).float().eval()
    device = next(denoiser.parameters()).device
    with torch.no_grad():
        wanted = [answer(full, call, device) for call in unseen]

    def made(scheme: Scheme, method: str) -> dict[str, Any]:
        kind = Effort(iterations=asked.iterations)
        algorithm = algorithms.by_name(method, "denoiser", kind)
        *rules, last = recipe_for(scheme, backbone, algorithm).rules
        recipe = Recipe((*rules, replace(last, algorithm=algorithm)))  # 8 bits by it, too
        start = time.perf_counter()
        artifact = tn.quantize(pipe, recipe, trajectory, temporal="none", measure=False)
        seconds, twin = time.perf_counter() - start, private_copy(full)
        options: Any = {"route": False, "execution": "int8", "simulate": True, "graphs": False}
        with torch.no_grad(), tn.attach(twin, artifact, **options):
            found = [answer(twin, call, device) for call in unseen]
        return {"relative_l2": distance(found, wanted), "seconds": seconds}

    key = {"model": name, "blocks": len(backbone.blocks), "weights": digest(fingerprint(denoiser))}
    return key | {"prompts": count, "iterations": asked.iterations} | how, made


def distance(found: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]]) -> float:
    """Relative L2 over all calls together."""
    pairs = [pair for one, other in zip(found, wanted, strict=True)
             for pair in zip(one, other, strict=True)]  # fmt: skip
    gap = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return math.sqrt(gap / sum(float(b.double().square().sum()) for _, b in pairs))


def rows_of(
    part: str, key: dict[str, Any], made: Measured, asked: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of one model, from the file where it has them."""
    done = known(asked.out)
    about = {"machine": cpu_name(), "threads": torch.get_num_threads(),
             "torch": torch.__version__, "date": str(datetime.date.today())}  # fmt: skip
    for scheme in asked.schemes:
        least = 0.0
        for method in rounding_names(part, asked.rows, SCHEMES[scheme]):
            own = key | {"scheme": scheme, "algorithm": method, "version": tn.__version__}
            row = done.get(json.dumps(own, sort_keys=True))
            if row is None:
                facts = made(SCHEMES[scheme], method)
                error: float = facts["relative_l2"]
                nearer = decibels(error if method == NEAREST else least, error)
                row = {"key": own, **facts, "db": nearer, **about}
                emit(row, asked.out)
            least = row["relative_l2"] if method == NEAREST else least
            yield row


def decibels(nearest: float, error: float) -> float:
    """How much nearer than round-to-nearest, in dB."""
    return round(20 * math.log10(nearest / max(error, 1e-12)), 2)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table a model: relative L2 (dB to nearest), and the mean seconds to calibrate."""
    text: list[str] = []
    for model in dict.fromkeys((r["key"]["model"], r["key"]["blocks"]) for r in rows):
        some = [r for r in rows if (r["key"]["model"], r["key"]["blocks"]) == model]
        schemes = list(dict.fromkeys(r["key"]["scheme"] for r in some))
        facts = some[0]
        text += ["", f"{model[0]}, {model[1]} blocks, {facts['key']['prompts']} prompts; "
                 f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, "
                 f"{facts['date']}", "", f"| | {' | '.join(schemes)} | s |",
                 "| --- " * (len(schemes) + 2) + "|"]  # fmt: skip
        for method in dict.fromkeys(r["key"]["algorithm"] for r in some):
            own = {r["key"]["scheme"]: r for r in some if r["key"]["algorithm"] == method}
            cells = [cell(own.get(scheme)) for scheme in schemes]
            spent = sum(r["seconds"] for r in own.values()) / len(own)
            text.append(f"| {method} | {' | '.join(cells)} | {spent:.0f} |")
    return "\n".join(text)


def cell(row: dict[str, Any] | None) -> str:
    """The error of a row, and how much nearer it is."""
    if row is None:
        return ""
    nearer = "" if row["key"]["algorithm"] == NEAREST else f" ({row['db']:+.1f})"
    return f"{row['relative_l2']:.4f}{nearer}"


def main(words: list[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, nargs="*", default=[], help="folders")
    parser.add_argument("--model", nargs="*", default=[], help="demo:unet, demo:transformer, ...")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--rows", nargs="*", default=["*"], help="algorithms (fnmatch)")
    parser.add_argument("--prompts", type=int, default=32, help="calibrated on")
    parser.add_argument("--blocks", type=int, help="of an encoder: the first ones alone")
    parser.add_argument("--steps", type=int, help="of a denoiser's runs (its own)")
    parser.add_argument("--iterations", type=int, default=300, help="of what is learnt")
    parser.add_argument("--out", type=Path, help="append the JSON lines here; rows there are done")
    asked = parser.parse_args(words)
    sources = [("encoder", of_encoder, folder) for folder in asked.encoder]
    sources += [("denoiser", of_denoiser, name) for name in asked.model]
    rows = [row for part, of, name in sources for row in rows_of(part, *of(name, asked), asked)]
    print(markdown(rows))


if __name__ == "__main__":
    main()
