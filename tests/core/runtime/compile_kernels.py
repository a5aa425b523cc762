"""Gives every kernel in Triton to its compiler, for a card that is not here.

    python tests/core/runtime/compile_kernels.py [--whole]

Triton's interpreter, in which kernels are tested where there is no GPU, runs Python: it takes what
the compiler refuses. Here the compiler reads them, in the branches that layers use; `--whole`: up
to the code of an H100 (sm_90), which takes a second or two each. Nothing runs.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tenuto.runtime import kernels
from tenuto.runtime.kernels import (
    column_rounding_triton,
    finished_product_triton,
    gated_product_triton,
    group_norm_triton,
    int4_fused_triton,
    int8_conv2d_fused_triton,
    product_triton,
    quantize_after_triton,
    quantize_input_triton,
    rotary_triton,
)
from tenuto.runtime.kernels.tiles_triton import Tiles

HOPPER = GPUTarget("cuda", 90, 32)
HALF, CODES, E4M3 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
compiled: set[str] = set()


class Card:
    """What Triton asks a driver for when it compiles."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Read(Exception):
    """The compiler has read a kernel."""


def stop(*_: Any) -> None:
    """In place of what comes after reading."""
    raise Read


def only_read(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str]:
    """A hook of Triton: asked for its name, or given what is done with a kernel that was read."""
    if stages is not None:
        stages[next(iter(stages))] = stop
    return "only read", "only read"


def compile_only(kernel: Any, grid: Any, near: Any, *args: Any, **options: Any) -> None:
    """In place of `tiles_triton.start`."""
    with contextlib.suppress(Read):
        kernel.warmup(*args, grid=grid, **options)
    compiled.add(kernel.__name__)


def calls() -> Iterator[tuple[str, Any]]:
    """Each kernel as layers call it, in its branches."""
    x, rows = torch.randn(64, 256, dtype=HALF), torch.rand(64, 1)
    c, w = torch.zeros(64, 256, dtype=CODES), torch.zeros(512, 256, dtype=CODES)
    scale, sums, bias = torch.rand(512), torch.zeros(512, dtype=torch.int32), torch.rand(512)
    one, zero = torch.rand(1), torch.zeros(1, dtype=torch.int32)
    gate, rest = torch.randn(2, 1, 512, dtype=HALF), torch.randn(2, 32, 512, dtype=HALF)
    then = product_triton.after(gate, rest)
    plain, tma = Tiles(64, 64, 64), Tiles(128, 128, 64, 8, 3, tma=True, persistent=True)
    lean = product_triton.linear
    for tiles in (plain, tma):
        yield "int8", lambda t=tiles: lean(c, rows, None, w, scale, sums, None, HALF, t)
        yield "e4m3", lambda t=tiles: lean(
            c.to(E4M3), one, None, w.to(E4M3), scale, None, bias, HALF, t
        )  # fmt: skip
        yield "finished", lambda t=tiles: lean(c, one, zero, w, scale, sums, bias, HALF, t, then)
        for act, first in (("geglu", False), ("swiglu", True)):
            yield act, lambda t=tiles, a=act, f=first: gated_product_triton.linear(
                c, one, zero, w, scale, sums, bias, a, f, HALF, t._replace(n=64)
            )  # fmt: skip
    yield "gate", lambda: gated_product_triton.gated(x, "geglu", False)
    yield "residual", lambda: finished_product_triton.gated(rest.view(64, 512), then)
    low = torch.zeros(512, 128, dtype=torch.uint8)
    few = torch.zeros(512, 8, dtype=torch.uint8)
    yield "int4", lambda: int4_fused_triton.unpacked(low, few[:, 0].contiguous(), None, 256, 256)
    yield "int4 groups", lambda: int4_fused_triton.unpacked(low, few, few, 256, 32)
    image, kernel = torch.zeros(2, 8, 8, 32, dtype=CODES), torch.zeros(64, 3, 3, 32, dtype=CODES)
    around = (1, 1), (1, 1), (1, 1)
    for size, none, more in ((torch.rand(2), None, None), (one, zero, bias[:64])):
        yield "conv2d", lambda s=size, z=none, b=more: int8_conv2d_fused_triton.conv2d(
            image, s, z, kernel, scale[:64], sums[:64], b, HALF, around, plain
        )  # fmt: skip
    for name in ("int", "e4m3"):
        yield "rows", lambda n=name: quantize_input_triton.per_row(x, n)
        yield "two parts", lambda n=name: quantize_input_triton.per_row(x[:, :160], n)
        yield "stored", lambda n=name: quantize_input_triton.stored(
            x, rows[:, 0], rows[:, 0], torch.tensor([3]), n
        )  # fmt: skip
        yield "act", lambda n=name: quantize_after_triton.acted(None, x, None, "gelu", n)
        yield "acts", lambda n=name: quantize_after_triton.acted(x, x, x, "silu", n)
        yield "norm", lambda n=name: quantize_after_triton.normed(
            rest, bias.to(HALF), None, gate, gate, 1e-6, False, n
        )  # fmt: skip
    yield "layer norm", lambda: quantize_after_triton.normed(
        rest, None, bias.to(HALF), gate, None, 1e-6, True, "int", True
    )  # fmt: skip
    yield "images", lambda: quantize_input_triton.per_image(rest.view(2, 8, 32, 64))
    heads, angles = torch.randn(2, 16, 4, 64, dtype=HALF), torch.rand(1, 16, 1, 64)
    for halves in (False, True):
        yield "rotary", lambda h=halves: rotary_triton.turn(
            heads, heads[0, 0, 0], 1e-6, angles, angles, h
        )  # fmt: skip
    yield "shared", lambda: rotary_triton.turn(
        heads, None, 1e-6, angles[..., :32], angles[..., :32], True
    )  # fmt: skip
    pixels = torch.randn(2, 40, 32, 32, dtype=HALF).to(memory_format=torch.channels_last)
    shift, own = torch.rand(2, 40, 1, 1, dtype=HALF), torch.rand(40, dtype=HALF)
    for plus, weight in ((None, None), (shift, own)):
        yield "group norm", lambda p=plus, v=weight: group_norm_triton.factors(
            pixels, p, 4, v, v, 1e-5
        )  # fmt: skip


def columns() -> None:
    """The loops of GPTQ and of descent, which start themselves."""
    for kernel, inputs, outputs in (
        (column_rounding_triton._compensate, 5, 2),
        (column_rounding_triton._descend, 6, 1),
    ):  # fmt: skip
        given = [torch.rand(64, 64) for _ in range(inputs + outputs)]
        compile_only(kernel, (1,), None, *given, 64, 64, ROWS=column_rounding_triton.ROWS,
                     WIDE=64, num_warps=4)  # fmt: skip


def launched() -> set[str]:
    """The kernels of the package that a grid is given: those that no other kernel calls."""
    found: dict[str, JITFunction[Any]] = {}
    for part in pkgutil.iter_modules(kernels.__path__):
        if part.name.endswith("_triton"):
            module = importlib.import_module(f"{kernels.__name__}.{part.name}")
            module.__dict__.update({"start": compile_only} if "start" in vars(module) else {})
            found |= {k: v for k, v in vars(module).items() if isinstance(v, JITFunction)}
    words = [set(one.fn.__code__.co_names) for one in found.values()]
    return {name for name in found if not any(name in some for some in words)}


def main() -> None:
    names = launched()
    driver.set_active(Card())
    if "--whole" not in sys.argv:
        triton.knobs.runtime.add_stages_inspection_hook = only_read
    for name, call in calls():
        start = time.perf_counter()
        try:
            call()
        except Exception as error:
            sys.exit(f"{name}: {error.__cause__ or error}\n{error}")
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    columns()
    if left := names - compiled:
        sys.exit(f"Not compiled: {sorted(left)}")


if __name__ == "__main__":
    main()
