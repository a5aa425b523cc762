"""The kernels in Triton on a card: right on odd and real shapes, then timed beside the library's.

    python benchmarks/check_kernels.py [--out kernels.jsonl] [--limit 150]

First every kernel and every choice of tiles is compared with its reference in float64 on fresh
random inputs, with memory that nobody wrote to poisoned. Then the shapes of DiT-XL/2, FLUX.2-klein
and SDXL are timed: calls of one kind in one CUDA graph, going round among inputs that together are
larger than the L2 cache, the median of its replays. Beside each time stands its floor: operations
over twice the bf16 rate, or bytes over the rate of a copy, both measured first on this card. Rows
go to the file as they are measured. `TRITON_INTERPRET=1 ... --device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))

from tenuto.numerics import QTensor, float8
from tenuto.numerics.scheme import Format
from tenuto.runtime.kernels import (
    int4_fused,
    int8_conv2d,
    int8_conv2d_fused,
    int8_fused,
    int8_linear,
    quantize_input,
)  # fmt: skip
from tenuto.runtime.kernels.int8_linear import IntLinear

SHAPES = [  # M, N, K
    (512, 1152, 1152), (512, 4608, 1152), (4096, 3456, 1152), (4096, 4608, 1152),
    (4096, 1152, 4608), (4608, 9216, 3072), (4608, 3072, 12288), (8192, 1280, 1280),
    (8192, 10240, 1280), (2048, 10240, 1280), (2, 6912, 1152),
]  # fmt: skip
FILTERS = [  # of SDXL: batch, channels, side, outputs, taps
    (2, 320, 128, 320, 3), (2, 960, 128, 320, 3), (2, 640, 64, 640, 3), (2, 1280, 32, 1280, 3),
    (2, 1280, 32, 1280, 1),
]  # fmt: skip
ODD_FILTERS = [(3, 48, 17, 33, 3)]
ODD = [(3, 5, 7), (65, 127, 1153), (130, 72, 208), (300, 1001, 96)]
CALLS, REPLAYS = 20, 15
SPREAD = 160 * 2**20  # bytes of inputs that go round: more than any L2 cache
MOST = 12  # sets of them


class Card:
    """The device, what it reaches, and the file that rows go to."""

    def __init__(self, device: str, out: Path, limit: float) -> None:
        self.device, self.out, self.end = device, out, time.time() + limit
        self.cuda = device == "cuda"
        self.copy = self.rate = 1.0  # bytes and operations (of bf16) a second
        self.rows: list[dict[str, Any]] = []

    def note(self, **row: Any) -> None:
        """Print a row and keep it."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def time(self, calls: list[Callable[[], Any]]) -> float:
        """Microseconds of a call: `calls` in turn, `CALLS` of them in a graph."""
        run = [calls[i % len(calls)] for i in range(max(CALLS, len(calls)))]
        for call in calls:
            call()
        if not self.cuda:
            start = time.perf_counter()
            run[0]()
            return (time.perf_counter() - start) * 1e6
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in run:
                call()
        for _ in range(2):
            graph.replay()
        return statistics.median(self.replay(graph) for _ in range(REPLAYS)) / len(run)

    @staticmethod
    def replay(graph: Any) -> float:
        """Microseconds of one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def measure(self) -> None:
        """What a copy and a large product in bf16 reach."""
        size, side = (2**31, 8192) if self.cuda else (2**16, 64)
        here, there = (torch.ones(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        self.copy = 2 * size / self.time([lambda: there.copy_(here)]) * 1e6
        a, b = (torch.randn(side, side, device=self.device).bfloat16() for _ in range(2))
        self.rate = 2 * side**3 / self.time([lambda: a @ b]) * 1e6
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        import triton

        self.note(card=name, torch=torch.__version__, triton=triton.__version__,
                  copy_TBs=round(self.copy / 1e12, 2),
                  bf16_TFLOPs=round(self.rate / 1e12))  # fmt: skip

    def floor(self, moved: float, operations: float, whole: bool) -> float:
        """Microseconds that no kernel is faster than; whole: 8 bits, at twice the rate of bf16."""
        return 1e6 * max(moved / self.copy, operations / (self.rate * (2 if whole else 1)))


# --- right ------------------------------------------------------------------------------------


def operands(card: Card, m: int, n: int, k: int) -> dict[str, Any]:
    """Fresh inputs of a product."""
    here: Any = {"device": card.device}
    x = torch.randint(-128, 128, (m, k), **here).to(torch.int8)
    codes = torch.randint(-127, 128, (n, k), **here).to(torch.int8)
    return {
        "x": x, "packed": IntLinear(codes, torch.rand(n, **here) + 0.5),
        "scale": torch.rand(m, 1, **here) / k, "one": torch.rand(1, **here) / k,
        "zero": torch.randint(0, 256, (1,), **here).int(),
        "bias": torch.randn(n, **here).bfloat16(), "bias32": torch.randn(n, **here),
    }  # fmt: skip


def product_errors(card: Card, shape: tuple[int, int, int]) -> Iterator[tuple[str, float]]:
    """(what, relative error) of all that a product can be followed by, for all tiles."""
    from tenuto.runtime.kernels import product_triton as fused

    o = operands(card, *shape)
    packed, x = o["packed"], o["x"]
    parts = packed.codes(), packed.scale, packed.sums
    ways = {"all": (o["scale"], o["zero"], o["bias"])}
    if shape not in ODD:  # each is compiled anew
        ways["row"] = (o["scale"], None, o["bias"])
        ways["stored"] = (o["one"], o["zero"], None)
    for name, (scale, zero, bias) in ways.items():
        middle = 128 if zero is None else zero
        wanted = int8_linear.reference(x, scale, middle, packed.codes(), packed.scale, bias)
        for tiles in fused.candidates(shape[0], shape[2], x.device):
            try:
                found = fused.linear(x, scale, zero, *parts, bias, torch.bfloat16, tiles)
            except Exception as error:
                card.note(failed=f"{name} {tuple(tiles)}", shape=shape, error=repr(error)[:200])
                continue
            yield f"{name} {tuple(tiles)}", off(found, wanted)


def off(found: Tensor, wanted: Tensor) -> float:
    """The relative error; NaN where nothing was written."""
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def filter_errors(card: Card, shape: tuple[int, ...]) -> Iterator[tuple[str, float]]:
    """(what, relative error) of a convolution, in all tiles."""
    from tenuto.runtime.kernels import int8_conv2d_fused_triton as fused

    o = filters(card, *shape)
    packed, last = o["fused"], o["x"].permute(0, 2, 3, 1)
    zero = torch.tensor([90], dtype=torch.int32, device=card.device)
    for name, scale, some in (("image", o["scale"], None), ("stored", o["scale"][:1], zero)):
        given = o["codes"], packed.scale, o["bias"], o["geometry"]
        wanted = int8_conv2d.reference(o["x"], scale, 128 if some is None else some, *given)
        for tiles in fused.HOPPER:
            more: Any = some, *packed.tensors(), o["bias"], torch.bfloat16, o["geometry"][:3], tiles
            found = fused.conv2d(last, scale, *more).permute(0, 3, 1, 2)
            yield f"{name} {tuple(tiles)}", off(found, wanted)


def four_errors(card: Card, shape: tuple[int, int, int]) -> Iterator[tuple[str, float]]:
    """(what, relative error) of products with weights of 4 bits."""
    o = operands(card, *shape)
    for group in (0, 32, 64, 128):
        weight = torch.randn(shape[1:], device=card.device)
        q = QTensor.nearest(weight, Format(4, symmetric=False, group=group))
        for zero in (128, o["zero"]):
            given = o["x"], o["scale"], zero
            packed = int4_fused.KERNEL.pack(q, None)
            found = int4_fused.KERNEL.call(*given, packed, o["bias"], torch.bfloat16)
            wanted = int4_fused.KERNEL.reference(*given, q, o["bias"], None)
            yield f"groups of {group}", off(found, wanted)


def rows_errors(card: Card, shape: tuple[int, int, int]) -> Iterator[tuple[str, float]]:
    """(what, share of codes that differ) of the quantization of rows and of stored ranges."""
    from tenuto.runtime.kernels import quantize_input_triton as fused

    m, _, k = shape
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = (torch.randn(m, k, device=card.device) * 3).to(dtype)
        codes, scale = fused.per_row(x)
        wanted, their = quantize_input.reference_per_row(x)
        yield f"rows {dtype}", different(quantize_input.counted(codes), wanted, scale, their)
        codes, scale = fused.per_row(x, "e4m3")
        wanted, their = float8.per_row(x)
        yield f"rows e4m3 {dtype}", different(codes, wanted, scale, their)
        scales = torch.rand(3, device=card.device) / 20 + 0.01
        zeros = torch.randint(0, 256, (3,), device=card.device).float()
        index = torch.tensor([2], device=card.device)
        codes, scale, zero = fused.stored(x, scales, zeros, index)
        wanted = quantize_input.reference_per_tensor(x, scales[2:], zeros[2:])
        assert torch.equal(zero, zeros[2:].int())
        yield f"stored {dtype}", different(quantize_input.counted(codes), wanted, scale, scales[2:])


def different(found: Tensor, wanted: Tensor, scale: Tensor, their: Tensor) -> float:
    """The share of codes that differ, all of them where a scale does; one may, on an edge."""
    if not torch.allclose(scale, their, rtol=1e-6):
        return float("nan")
    return max(0.0, float((found.float() != wanted.float()).sum()) - 1) / found.numel()


def check(card: Card, shapes: list[Any], sides: list[Any]) -> bool:
    """Whether each ran, in some tiles at the least, and is right; the worst of each is noted."""
    fine, bound = True, 4e-3 * (1 if card.cuda else 20)  # the interpreter cuts off, a card rounds
    every = [*itertools.product(shapes, (product_errors, rows_errors))]
    every += [(shapes[-1], four_errors), (ODD[-1], four_errors)]
    for shape, errors in (*every, *((shape, filter_errors) for shape in sides)):
        before = len(card.rows)
        try:
            found = list(errors(card, shape))
        except Exception as error:  # the others are still to be seen
            found = [(repr(error)[:300], float("nan"))]
        wrong = [(what, error) for what, error in found if not error <= bound]
        worst = max((error for _, error in found), default=0.0)
        kind = errors.__name__.partition("_")[0]
        failed = sum("failed" in row for row in card.rows[before:])
        card.note(check=kind, shape=shape, cases=len(found), not_run=failed, worst=worst,
                  wrong=wrong[:9])  # fmt: skip
        fine &= bool(found) and not wrong
    return fine


# --- fast -------------------------------------------------------------------------------------


def sets(moved: float) -> int:
    """So many inputs that no cache holds them all."""
    return max(1, min(MOST, int(SPREAD // moved) + 1))


def products(card: Card, m: int, n: int, k: int) -> None:
    """A product with its scales and bias in every way, beside bf16."""
    from tenuto.runtime.kernels import product_triton as fused

    moved = m * k + n * k + 2 * m * n
    many = [operands(card, m, n, k) for _ in range(sets(moved) if card.cuda else 1)]
    for o in many:
        o["wide"], o["weight"] = (t.bfloat16() for t in (o["x"], o["packed"].codes()))
        q = QTensor.nearest(o["weight"].float(), Format(4, symmetric=False, group=32))
        o["four"] = int4_fused.KERNEL.pack(q, None)
    ways: dict[str, Callable[[dict[str, Any]], Any]] = {
        "bf16": lambda o: F.linear(o["wide"], o["weight"], o["bias"]),
        "fused": lambda o: int8_fused.fused_linear(
            o["x"], o["scale"], 128, o["packed"], o["bias"], torch.bfloat16),
        "layer": layer, "4-bit": lambda o: int4_fused.KERNEL.call(
            o["x"], o["scale"], 128, o["four"], o["bias"], torch.bfloat16),
    }  # fmt: skip
    if m > 16 and n % 8 == 0 and k % 8 == 0:
        ways["cublas"] = lambda o: torch._int_mm(o["x"], o["packed"].weight)
        ways["cublas, epilogue"] = lambda o: int8_linear.int8_linear(
            o["x"], o["scale"], 128, o["packed"], o["bias32"], torch.bfloat16)  # fmt: skip
    found = {name: card.time([functools.partial(way, o) for o in many])
             for name, way in ways.items()}  # fmt: skip
    tiles = {
        str(tuple(one)): in_tiles(card, many, one)
        for one in fused.candidates(m, k, many[0]["x"].device)
    }
    floor = card.floor(moved, 2.0 * m * n * k, True)
    card.note(kernel="product", shape=(m, n, k), floor=round(floor, 2), tiles=tiles,
              **{name: round(us, 2) for name, us in found.items()})  # fmt: skip


def in_tiles(card: Card, many: list[dict[str, Any]], tiles: Any) -> float | str:
    """Microseconds of the product in these tiles, or why it does not run in them."""
    from tenuto.runtime.kernels import product_triton as fused

    def call(o: dict[str, Any]) -> Tensor:
        packed = o["packed"]
        parts = packed.codes(), packed.scale, packed.sums, o["bias"], torch.bfloat16
        return fused.linear(o["x"], o["scale"], None, *parts, tiles=tiles)

    try:
        return round(card.time([functools.partial(call, o) for o in many]), 2)
    except Exception as error:
        return repr(error)[:80]


def layer(o: dict[str, Any]) -> Tensor:
    """Two launches: codes of an input in bf16, and the product."""
    codes, scale = quantize_input.per_row(o["wide"])
    return int8_fused.fused_linear(codes, scale, 128, o["packed"], o["bias"], torch.bfloat16)


def quantized(card: Card, m: int, k: int) -> None:
    """Codes of rows and of a stored range, beside plain operations."""
    from tenuto.runtime.kernels import quantize_input_triton as fused

    moved = 3 * m * k
    many = [torch.randn(m, k, device=card.device).bfloat16()
            for _ in range(sets(moved) if card.cuda else 1)]  # fmt: skip
    scales, zeros = (torch.full((3,), v, device=card.device) for v in (0.03, 77.0))
    index = torch.tensor([1], device=card.device)
    ways: dict[str, Callable[[Tensor], Any]] = {
        "plain": quantize_input.reference_per_row, "rows": fused.per_row,
        "rows e4m3": lambda x: fused.per_row(x, "e4m3"),
        "stored": lambda x: fused.stored(x, scales, zeros, index),
    }  # fmt: skip
    found = {name: round(card.time([functools.partial(way, x) for x in many]), 2)
             for name, way in ways.items()}  # fmt: skip
    floor = round(card.floor(moved, 0, True), 2)
    card.note(kernel="codes", shape=(m, k), floor=floor, **found)


def filters(card: Card, b: int, c: int, side: int, n: int, taps: int) -> dict[str, Any]:
    """Fresh inputs of a convolution that keeps the size, channels last, one of a kind."""
    here: Any = {"device": card.device}
    x = torch.randint(-128, 128, (b, side, side, c), **here).to(torch.int8).permute(0, 3, 1, 2)
    codes = torch.randint(-127, 128, (n, c, taps, taps), **here).to(torch.int8)
    geometry: Any = ([1, 1], [taps // 2] * 2, [1, 1], 1)
    w_scale = torch.rand(n, **here) + 0.5
    return {
        "x": x, "codes": codes, "geometry": geometry, "bias": torch.randn(n, **here).bfloat16(),
        "fused": int8_conv2d_fused.Filters(codes, w_scale, geometry),
        "patches": int8_conv2d.IntConv2d(codes, w_scale, geometry),
        "scale": torch.rand(b, 1, 1, 1, **here) / codes[0].numel(),
    }  # fmt: skip


def convolutions(card: Card, *shape: int) -> None:
    """A convolution beside bf16 in both layouts, and the codes of its input."""
    b, c, side, n, taps = shape
    moved = b * side * side * (c + 2 * n) + n * c * taps * taps
    many = [filters(card, *shape) for _ in range(sets(moved) if card.cuda else 1)]
    for o in many:
        o["wide"], o["rows"] = o["x"].bfloat16(), o["x"].bfloat16().contiguous()
        o["weight"], o["x rows"] = o["codes"].bfloat16(), o["x"].contiguous()
        o["last"] = o["weight"].contiguous(memory_format=torch.channels_last)
    half, pad = torch.bfloat16, taps // 2
    ways: dict[str, Callable[[dict[str, Any]], Any]] = {
        "bf16": lambda o: F.conv2d(o["rows"], o["weight"], o["bias"], 1, pad),
        "bf16 last": lambda o: F.conv2d(o["wide"], o["last"], o["bias"], 1, pad),
        "patches": lambda o: int8_conv2d.int8_conv2d(
            o["x"], o["scale"], 128, o["patches"], o["bias"].float(), half),
        "fused": lambda o: int8_conv2d_fused.call(
            o["x rows"], o["scale"], 128, o["fused"], o["bias"], half),
        "fused last": lambda o: int8_conv2d_fused.call(
            o["x"], o["scale"], 128, o["fused"], o["bias"], half),
        "codes": lambda o: quantize_input.per_row(o["rows"], (1, 2, 3)),
    }  # fmt: skip
    torch.backends.cudnn.benchmark = True
    found = {name: round(card.time([functools.partial(way, o) for o in many]), 2)
             for name, way in ways.items()}  # fmt: skip
    operations = 2.0 * b * side * side * n * c * taps * taps
    card.note(kernel="conv", shape=shape, floor=round(card.floor(moved, operations, True), 2),
              **found)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: microseconds, and how many times as fast as bf16; of codes as the floor allows."""
    lines = ["| M, N, K | floor | bf16 | cuBLAS int8 | + epilogue | fused (x bf16) | of the floor |"
             " layer (x bf16) | 4-bit (x bf16) |",
             "| --- " * 9 + "|"]  # fmt: skip
    for r in (r for r in rows if r.get("kernel") == "product"):
        cells = [r["floor"], r["bf16"], r.get("cublas", ""), r.get("cublas, epilogue", "")]
        ratios = {w: f"{r[w]} ({r['bf16'] / r[w]:.2f})" for w in ("fused", "layer", "4-bit")}
        cells += [ratios["fused"], f"{r['floor'] / r['fused']:.0%}"]
        cells += [ratios["layer"], ratios["4-bit"]]
        lines.append(f"| {', '.join(map(str, r['shape']))} | {' | '.join(map(str, cells))} |")
    lines += ["", "| M, K | floor | plain | rows | of the floor | rows e4m3 | stored |",
              "| --- " * 7 + "|"]  # fmt: skip
    for r in (r for r in rows if r.get("kernel") == "codes"):
        cells = r["floor"], r["plain"], r["rows"], f"{r['floor'] / r['rows']:.0%}"
        more = (*cells, r["rows e4m3"], r["stored"])
        lines.append(f"| {', '.join(map(str, r['shape']))} | {' | '.join(map(str, more))} |")
    names = ("floor", "bf16", "bf16 last", "patches", "fused", "fused last", "codes")
    lines += ["", f"| B, C, side, N, taps | {' | '.join(names)} |", "| --- " * 8 + "|"]
    for r in (r for r in rows if r.get("kernel") == "conv"):
        cells = " | ".join(str(r[name]) for name in names)
        lines.append(f"| {', '.join(map(str, r['shape']))} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("kernels.jsonl"))
    parser.add_argument("--limit", type=float, default=150.0, help="seconds; the rest is left out")
    args = parser.parse_args()
    card = Card(args.device, args.out, args.limit)
    shapes = SHAPES if card.cuda else [(3, 8, 32)]
    with torch.no_grad():
        card.measure()
        torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what is not written
        sides = [*ODD_FILTERS, FILTERS[3]] if card.cuda else ODD_FILTERS[:1]
        fine = check(card, [*ODD, *shapes[4:6]] if card.cuda else ODD[:1], sides)
        torch.use_deterministic_algorithms(False)
        card.note(right=fine)
        work = [(quantized, shape) for shape in sorted({(m, k) for m, _, k in shapes})]
        work = [*((products, shape) for shape in shapes), *work]
        work += [(convolutions, s) for s in (FILTERS if card.cuda else ODD_FILTERS[:1])]
        for measure, shape in work:
            if time.time() > card.end:
                card.note(left_out=[shape, measure.__name__])
                continue
            try:
                measure(card, *shape)
            except Exception as error:  # one row is missing, the others are measured
                card.note(failed=measure.__name__, shape=shape, error=repr(error)[:300])
                fine = False
    print(table(card.rows))
    sys.exit(not fine)


if __name__ == "__main__":
    main()
