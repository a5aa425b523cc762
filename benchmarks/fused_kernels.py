"""The kernels that fuse operations, timed beside what torch.compile makes of the same.

    python benchmarks/fused_kernels.py [--out fused.jsonl] [--limit 200]

On shapes of SDXL, FLUX.2-klein and DiT-XL/2: group norms of images with channels last, codes of
what a norm or an activation gives, rotary embeddings, products of 8-bit codes with a gate or a sum
behind them. Every answer is compared with plain operations first. `check_kernels.py` says how a
call is timed and what a floor is: the bytes that must be read and written, or the operations.
`TRITON_INTERPRET=1 ... --device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from check_kernels import Card, sets
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))

from tenuto.numerics import float8
from tenuto.runtime.compiler import backend
from tenuto.runtime.kernels import quantize_after, rotary
from tenuto.runtime.kernels.finished_product import finished_fp8, finished_int8
from tenuto.runtime.kernels.gated_product import gated_fp8, gated_int8
from tenuto.runtime.kernels.quantize_input import PER_ROW

NORMS = [(2, 320, 128), (2, 960, 128), (2, 640, 64), (2, 1920, 64), (2, 1280, 32), (2, 2560, 32)]
ROWS = [(512, 1152), (4096, 1152), (4608, 3072), (8192, 1280)]
ACTED = [(4096, 4608), (4608, 9216), (2048, 5120)]
TURNED = [(1, 4608, 24, 128)]
PRODUCTS = [(4096, 1152, 4608), (8192, 640, 2560), (2048, 1280, 5120), (4608, 3072, 9216)]
Way = Callable[[dict[str, Any]], Any]


class Case:
    """One kernel at one shape. make: fresh inputs. moved: bytes. ways: by name."""

    def __init__(
        self, kernel: str, shape: Any, make: Callable[[], dict[str, Any]], plain: Way,
        ways: dict[str, Way], moved: float, operations: float = 0.0,
    ) -> None:  # fmt: skip
        self.kernel, self.shape, self.make, self.plain = kernel, shape, make, plain
        self.ways, self.moved, self.operations = ways, moved, operations


def measure(card: Card, case: Case) -> None:
    """Compare each way with plain operations, then time it."""
    some = case.make()
    wanted = _numbers(case.plain(some))
    for name, way in case.ways.items():
        off = float((_numbers(way(some)) - wanted).norm() / wanted.norm())
        if not off < 0.02:
            raise AssertionError(f"{name} is off by {off:.3g}")
    many = [case.make() for _ in range(sets(case.moved) if card.cuda else 1)]
    found = {name: round(card.time([functools.partial(way, o) for o in many]), 2)
             for name, way in case.ways.items()}  # fmt: skip
    floor = round(card.floor(case.moved, case.operations, True), 2)
    card.note(fused=case.kernel, shape=case.shape, floor=floor, **found)


def _numbers(found: Any) -> Tensor:
    """What codes and scales stand for, or the numbers themselves."""
    if isinstance(found, Tensor):
        return found.float()
    codes, scale = found
    if codes.dtype in (torch.uint8, torch.int8):
        return (codes.float() - (128 if codes.dtype is torch.uint8 else 0)) * scale
    return codes.float() * scale


def norms(card: Card, b: int, c: int, side: int) -> Case:
    """A group norm and SiLU, as residual blocks have them."""
    norm = nn.GroupNorm(32, c).to(card.device, torch.bfloat16)
    nn.init.normal_(norm.weight)

    def call(x: Tensor) -> Tensor:
        return F.silu(norm(x))

    def make() -> dict[str, Any]:
        x = torch.randn(b, c, side, side, device=card.device).bfloat16()
        return {"x": x, "last": x.to(memory_format=torch.channels_last)}

    own = torch.compile(call, backend=backend(backend=card_backend(card)), dynamic=False)
    first, last = (compiled(card, call) for _ in range(2))
    ways: dict[str, Way] = {
        "ours": lambda o: own(o["last"]), "compiled": lambda o: last(o["last"]),
        "compiled, channels first": lambda o: first(o["x"]), "torch": lambda o: call(o["x"]),
    }  # fmt: skip
    return Case("group norm, silu", (b, c, side), make, lambda o: call(o["x"]), ways,
                4.0 * b * c * side * side)  # fmt: skip


def card_backend(card: Card) -> str:
    return "inductor" if card.cuda else "eager"


def compiled(card: Card, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` by torch.compile, in a version of its own."""

    def own(*args: Any) -> Any:
        return call(*args)

    return torch.compile(own, backend=card_backend(card), dynamic=False)


def modulated(card: Card, m: int, k: int) -> Case:
    """Codes of a layer norm that is scaled and shifted, one row an image."""

    def make() -> dict[str, Any]:
        draw = [torch.randn(2, n, k, device=card.device).bfloat16() for n in (m // 2, 1, 1)]
        return dict(zip(("x", "times", "plus"), draw, strict=True))

    def plain(x: Tensor, times: Tensor, plus: Tensor) -> Any:
        y = F.layer_norm(x, (k,), eps=1e-6) * (1 + times) + plus
        return PER_ROW["e4m3"](y)

    ours: Any = quantize_after.quantize_normed
    rest = compiled(card, plain)
    ways: dict[str, Way] = {
        "ours": lambda o: ours(o["x"], None, None, o["times"], o["plus"], 1e-6, True, "e4m3", True),
        "compiled": lambda o: rest(o["x"], o["times"], o["plus"]),
    }
    return Case("codes of a modulated norm", (m, k), make, lambda o: plain(**o), ways, 3.0 * m * k)


def acted(card: Card, m: int, k: int) -> Case:
    """Codes of what a feed-forward with a gate gives, where its product is not fused."""

    def make() -> dict[str, Any]:
        x, gate = (torch.randn(m, k, device=card.device).bfloat16() for _ in range(2))
        return {"x": x, "gate": gate}

    def plain(x: Tensor, gate: Tensor) -> Any:
        return PER_ROW["e4m3"](F.silu(x) * gate)

    ours: Any = quantize_after.quantize_acted
    rest = compiled(card, plain)
    ways: dict[str, Way] = {
        "ours": lambda o: ours(None, o["x"], o["gate"], "silu", "e4m3"),
        "compiled": lambda o: rest(o["x"], o["gate"]),
    }
    return Case("codes of a gate", (m, k), make, lambda o: plain(**o), ways, 5.0 * m * k)


def turned(card: Card, *shape: int) -> Case:
    """Queries normed and turned."""
    b, s, _, d = shape
    angles = torch.rand(b, s, 1, d // 2, device=card.device).repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()
    weight = torch.rand(d, device=card.device).bfloat16() + 0.5

    def plain(x: Tensor) -> Tensor:
        return rotary.reference(x, weight, 1e-6, cos, sin, False)

    def make() -> dict[str, Any]:
        return {"x": torch.randn(shape, device=card.device).bfloat16()}

    ours: Any = rotary.turn
    rest = compiled(card, plain)
    ways: dict[str, Way] = {
        "ours": lambda o: ours(o["x"], weight, 1e-6, cos, sin, False),
        "compiled": lambda o: rest(o["x"]),
    }
    moved = 4.0 * b * s * shape[2] * d
    return Case("norm, rotary", shape, make, lambda o: plain(o["x"]), ways, moved)


def operands(card: Card, m: int, k: int, n: int, whole: bool) -> dict[str, Any]:
    """Codes and scales of an input (M, K) and a weight (K, N), a residual and a gate."""
    x, weight = (torch.randn(*size, device=card.device) for size in ((m, k), (n, k)))
    codes = [(v * 30).round().clamp(-127, 127).to(torch.int8) if whole else float8.cast(v * 8)
             for v in (x, weight)]  # fmt: skip
    scale = 0.03 if whole else 0.1
    return {
        "x": codes[0], "weight": codes[1].t(),
        "x scale": torch.full((m, 1), scale, device=card.device),
        "scale": torch.full((n,), scale / k**0.5, device=card.device),
        "sums": codes[1].float().sum(1).mul(128).int() if whole else None,
        "residual": torch.randn(2, m // 2, n, device=card.device).bfloat16(),
        "gate": torch.randn(2, 1, n, device=card.device).bfloat16(),
    }  # fmt: skip


def product(o: dict[str, Any], whole: bool) -> Tensor:
    """The product alone, in bf16, as layers compute it without anything behind it."""
    if not whole:
        return torch._scaled_mm(
            o["x"], o["weight"], scale_a=o["x scale"], scale_b=o["scale"][None],
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
    from tenuto.runtime.kernels.int8_fused import operation

    own: Any = operation
    return own(o["x"], o["x scale"], None, o["weight"], o["scale"], o["sums"], None, torch.bfloat16)


def gated(card: Card, m: int, k: int, n: int, whole: bool) -> Case:
    """value * gelu(gate), halves of one product."""

    def plain(o: dict[str, Any]) -> Tensor:
        value, gate = product(o, whole).chunk(2, -1)
        return value * F.gelu(gate)

    def ours(o: dict[str, Any]) -> Tensor:
        given = o["x"], o["x scale"], o["weight"]
        call: Any = gated_int8 if whole else gated_fp8
        if whole:
            return call(o["x"], o["x scale"], None, o["weight"], o["scale"], o["sums"], None,
                        "gelu", False, torch.bfloat16)  # fmt: skip
        return call(*given, o["scale"][None], None, "gelu", False, torch.bfloat16)

    ways: dict[str, Way] = {"ours": ours, "compiled": compiled(card, plain)}
    name = f"{'int8' if whole else 'fp8'} product, gelu gate"
    make = functools.partial(operands, card, m, k, 2 * n, whole)
    return Case(
        name, (m, 2 * n, k), make, plain, ways, m * k + 2 * n * k + 2 * m * n, 4.0 * m * n * k
    )


def finished(card: Card, m: int, n: int, k: int, whole: bool) -> Case:
    """residual + gate * product."""

    def plain(o: dict[str, Any]) -> Tensor:
        return o["residual"] + o["gate"] * product(o, whole).view(o["residual"].shape)

    def ours(o: dict[str, Any]) -> Tensor:
        call: Any = finished_int8 if whole else finished_fp8
        if whole:
            return call(o["x"], o["x scale"], None, o["weight"], o["scale"], o["sums"], None,
                        o["gate"], o["residual"], torch.bfloat16)  # fmt: skip
        return call(o["x"], o["x scale"], o["weight"], o["scale"][None], None, o["gate"],
                    o["residual"])  # fmt: skip

    ways: dict[str, Way] = {"ours": ours, "compiled": compiled(card, plain)}
    name = f"{'int8' if whole else 'fp8'} product, gate, residual"
    make = functools.partial(operands, card, m, k, n, whole)
    return Case(name, (m, n, k), make, plain, ways, m * k + n * k + 4 * m * n, 2.0 * m * n * k)


def cases(card: Card) -> Iterator[functools.partial[Case]]:
    """All of them; without a card a small one of each."""
    few = 1 if not card.cuda else None
    small: Any = {"norms": [(2, 64, 8)], "rows": [(64, 32)], "turned": [(1, 6, 2, 8)],
                  "products": [(64, 32, 48)]}  # fmt: skip
    given = {"norms": NORMS, "rows": ROWS, "turned": TURNED, "products": PRODUCTS}
    given = given if card.cuda else small
    for make, key in ((norms, "norms"), (modulated, "rows"), (turned, "turned")):
        yield from (functools.partial(make, card, *shape) for shape in given[key])
    yield from (functools.partial(acted, card, *s) for s in (ACTED if few is None else [(64, 32)]))
    for shape in given["products"]:
        for whole in (False, True):
            yield functools.partial(gated, card, *shape, whole)
            yield functools.partial(finished, card, shape[0], shape[1], shape[2], whole)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: microseconds, and how many times as fast as torch.compile."""
    lines = ["| kernel | shape | floor | ours | compiled | × | of the floor |", "| --- " * 7 + "|"]
    for r in (r for r in rows if "fused" in r):
        best = min(v for name, v in r.items() if name.startswith("compiled"))
        shape = " × ".join(map(str, r["shape"]))
        lines.append(
            f"| {r['fused']} | {shape} | {r['floor']} | {r['ours']} | {best} |"
            f" {best / r['ours']:.2f} | {r['floor'] / r['ours']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("fused.jsonl"))
    parser.add_argument("--limit", type=float, default=200.0, help="seconds; the rest is left out")
    args = parser.parse_args()
    card, fine = Card(args.device, args.out, args.limit), True
    with torch.no_grad():
        card.measure()
        for make in cases(card):
            if time.time() > card.end:
                card.note(left_out=str(make.args[1:]))
                continue
            torch._dynamo.reset()
            try:
                measure(card, make())
            except Exception as error:  # one row is missing, the others are measured
                card.note(failed=make.func.__name__, shape=make.args[1:], error=repr(error)[:300])
                fine = False
    print(table(card.rows))
    sys.exit(not fine)


if __name__ == "__main__":
    main()
