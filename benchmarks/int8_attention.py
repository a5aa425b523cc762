"""Attention whose products are in int8: what it costs in the images, and its time.

    python benchmarks/int8_attention.py --count 64 --out attention.jsonl

Rows of quality, for each demo model in full precision and at W8A8: PSNR to full precision at equal
seeds, median and 5th percentile, with attention as it is, with the scores (queries by keys) from
int8, and with the weighted sum of the values from int8 too. Rows of time: both beside torch's own
attention in fp32 and bf16, in turn, at shapes of the demo models and of known ones.

Queries have a range a token, keys a range a head, after the mean key is taken out (no softmax sees
it; SageAttention, arXiv 2410.02367, does that). Weights are whole numbers up to 127, the largest of
a row, or two of them (127ths of the first; a product each), and are divided by their own sum;
values have a range a channel. On a CPU and on CUDA products are `torch._int_mm`, a head at a time.
Where the package `sageattention` is installed on a GPU, its kernel (scores in int8, values in half
precision) is timed beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tenuto as tn
from benchmarks.default_kernels import images
from benchmarks.resumable import resumed
from benchmarks.schedules import MODELS, chip, surroundings
from tenuto.measure import psnr
from tenuto.model import denoiser_of, override_
from tenuto.runtime import percentile
from tenuto.sampling.loading import defaults, load

STEP = 127  # of the second number of a weight, to one of the first
ROWS = 256  # of queries at a time: their scores stay in the cache of a core
SHAPES = {  # images x guidance, heads, places, keys, channels
    "demo transformer": (2, 6, 64, 64, 64), "DiT-XL/2 256": (2, 16, 256, 256, 72),
    "SD1.5 512, largest": (2, 8, 4096, 4096, 40), "SDXL 1024, middle": (2, 20, 1024, 1024, 64),
    "SD1.5 512, text": (2, 8, 4096, 77, 40), "FLUX 1024": (1, 24, 4608, 4608, 128),
}  # fmt: skip


def in_int8(q: Tensor, k: Tensor, v: Tensor, terms: int, mask: Tensor | None = None) -> Tensor:
    """`attention` of (B, H, N, D). mask: bool, or added.

    terms: of how many whole numbers a weight is made, for the product with the values; 0: float.
    """
    count, k = k.shape[2], k - k.mean(2, keepdim=True)
    k, v = (pad(x, (0, 0, 0, -count % 8)) for x in (k, v))  # what cuBLAS takes
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, -math.inf)
    mask = None if mask is None else mask.expand(*q.shape[:-1], count)
    q8, q_scale = _rounded(q, (-1,))
    k8, k_scale = _rounded(k, (-1, -2))
    factors = q_scale * k_scale / math.sqrt(q.shape[-1])
    keys = k8.mT.contiguous()
    v8, v_scale = _rounded(v, (-2,))
    counted = torch.cat((v8, torch.ones_like(v8[..., :8])), -1)  # the last columns add up
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for start in range(0, q.shape[2], ROWS):
                at = b, h, slice(start, start + ROWS)
                scores = torch._int_mm(q8[at], keys[b, h]) * factors[at]
                scores[:, count:] = -math.inf
                if mask is not None:
                    scores[:, :count] += mask[at]
                if not terms:
                    out[at] = scores.softmax(-1).to(v.dtype) @ v[b, h]
                    continue
                scores -= scores.amax(1, keepdim=True) - math.log(127)
                weights, whole = scores.exp_(), scores.new_zeros(())
                for term in range(terms):
                    rest = weights.round()
                    part = torch._int_mm(rest.to(torch.int8), counted[b, h])
                    whole = whole + part / STEP**term
                    weights = (weights - rest) * STEP
                out[at] = whole[:, : v.shape[-1]] / whole[:, -1:] * v_scale[b, h]
    return out


def _rounded(x: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """int8 codes and the scale, one for all values over these dimensions."""
    x = x.float()
    scale = x.abs().amax(over, keepdim=True).clamp_(min=1e-8) / 127
    return (x / scale).round_().to(torch.int8), scale


class Int8Attention(TorchFunctionMode):
    """What is called within: `in_int8` in place of attention. taken: how many calls were."""

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.terms, self.taken = terms, 0

    def within(self, original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A denoiser's call within this: not the autoencoder's."""
        with self:
            return original(*args, **kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False))
        given |= kwargs or {}
        if func is not attention:
            return func(*args, **(kwargs or {}))
        self.taken += 1
        q, k, v = given["query"], given["key"], given["value"]
        return in_int8(q, k, v, self.terms, given.get("attn_mask")).to(q.dtype)


WAYS: dict[str, int | None] = {
    "float": None, "scores": 0, "scores and values, one term": 1, "scores and values": 2,
}  # fmt: skip


def quality(args: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    """Every row of a demo model that is not `done`."""
    for model in MODELS if args.model == "all" else (args.model,):
        pipe = load(f"demo:{model}", args.device)
        known, lines = defaults(pipe), tn.prompts("default")[:16]
        wanted, made = None, None
        for scheme in ("none", "w8a8"):
            for way, terms in WAYS.items():
                about = {"model": model, "scheme": scheme, "attention": way, "count": args.count}
                key = json.dumps(about)
                if key in done or (scheme == "none" and terms is None):
                    continue
                if wanted is None:
                    wanted = images(pipe, args)
                if made is None and scheme != "none":
                    runs = tn.record(pipe, lines, steps=known.steps, guidance=known.guidance)
                    made = tn.quantize(pipe, scheme, runs, preset="quick", measure=False)
                with ExitStack() as stack:
                    if scheme != "none":
                        assert made is not None
                        how: Any = {"route": False, "speedup": 1, "execution": "int8"}
                        stack.enter_context(tn.attach(pipe, made, **how))
                    mode = Int8Attention(terms) if terms is not None else None
                    if mode is not None:
                        stack.callback(override_(denoiser_of(pipe), mode.within).remove)
                    found = images(pipe, args)
                db = psnr(wanted, found).tolist()
                yield {"key": key} | about | {
                    "psnr": median(db), "psnr_5": percentile(db, 5),
                    "calls": mode.taken if mode is not None else 0, "chip": chip(pipe.device),
                } | surroundings()  # fmt: skip


def times(args: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    """Every shape that is not `done`: milliseconds, median and quartiles, all ways in turn."""
    device = torch.device(args.device or "cpu")
    draw = torch.Generator().manual_seed(0)
    for name, (batch, heads, places, keys, channels) in SHAPES.items():
        key = json.dumps([name, str(device)])
        if key in done:
            continue
        q, k, v = (
            torch.randn(batch, heads, n, channels, generator=draw).to(device)
            for n in (places, keys, keys)
        )
        half = [x.bfloat16() for x in (q, k, v)]
        ways: dict[str, Callable[[], Tensor]] = {
            "fp32": partial(attention, q, k, v), "bf16": partial(attention, *half),
            **{name: partial(in_int8, q, k, v, n) for name, n in WAYS.items() if n is not None},
        } | sage(*half)  # fmt: skip
        found: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(args.repeats + 1):
            for way, call in ways.items():
                start = time.perf_counter()
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                found[way] += [1e3 * (time.perf_counter() - start)] if turn else []
        ms = {way: [round(x, 3) for x in quantiles(taken, n=4)] for way, taken in found.items()}
        yield {"key": key, "shape": name, "ms": ms, "chip": chip(device)} | surroundings()


def sage(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """SageAttention's kernel, where it is installed and takes these."""
    try:
        from sageattention import sageattn  # type: ignore[import-not-found]

        sageattn(q, k, v)
    except (ImportError, AssertionError, ValueError, RuntimeError):
        return {}
    return {"sageattention": partial(sageattn, q, k, v)}


def rows(args: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    """All of them."""
    yield from times(args, done)
    yield from quality(args, done)


def markdown(found: list[dict[str, Any]]) -> str:
    """Both tables."""
    lines = ["| model | scheme | attention in int8 | PSNR (5th) |", "|" + " --- |" * 4]
    for r in (r for r in found if "psnr" in r):
        db = f"{r['psnr']:.1f} ({r['psnr_5']:.1f})"
        lines.append(f"| {r['model']} | {r['scheme']} | {r['attention']} | {db} |")
    lines += ["", "| shape | way | ms (quartiles) | of fp32 |", "|" + " --- |" * 4]
    for r in (r for r in found if "ms" in r):
        for way, (low, middle, high) in r["ms"].items():
            share = r["ms"]["fp32"][1] / middle
            spread = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            lines.append(f"| {r['shape']} | {way} | {spread} | {share:.2f} x as fast |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="all", choices=["all", *MODELS])
    parser.add_argument("--count", type=int, default=64, help="images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7, help="of each time")
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    resumed(args.out, partial(rows, args), markdown)


if __name__ == "__main__":
    main()
