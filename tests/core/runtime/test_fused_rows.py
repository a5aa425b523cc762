"""The quantization of rows with what makes them: kernels, operations, and the pass over a graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import tenuto as tn
from tenuto.model import denoiser_of, describe, tensors_in
from tenuto.numerics import float8
from tenuto.runtime import compiler
from tenuto.runtime.compiler import backend
from tenuto.runtime.denoiser_call import CompiledBlocks
from tenuto.runtime.fused_rows import fuse
from tenuto.runtime.kernels import input_memo, quantize_after, quantize_input
from tenuto.runtime.kernels.quantize_after import ACTS, reference_acted, reference_normed
from tests.core import tiny_pipelines as tiny
from tests.core.runtime.test_triton_kernels import (
    DTYPES,
    HERE,
    codes_match,
    floats_match,
    in_triton,
    needs_triton,
)

OPS = torch.ops.tenuto
Call = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of a CPU keep the quantization of rows whole, as those of a GPU do."""
    monkeypatch.setattr(quantize_input, "gpu", lambda x: True)


# --- kernels and operations -----------------------------------------------------------------------


def right(found: tuple[Tensor, Tensor], exact: Tensor, dtype: str, case: Any = None) -> None:
    """Codes and scales of `exact`, up to rounding. case: named in the failure."""
    codes, scale = found
    assert codes.dtype is quantize_input.TYPES[dtype] and codes.shape == exact.shape
    if dtype == "int":
        wanted, their = quantize_input.reference_per_row(exact)
        codes_match(codes, wanted, case)
    else:
        near, their = float8.per_row(exact)
        if HERE == "cpu":
            floats_match(codes, near, exact / their)
        else:  # sums in another order may cross a tie
            assert torch.allclose(codes.float(), near.float(), rtol=0.126, atol=2**-9)
    assert torch.allclose(scale, their, rtol=1e-5)


def gpu_inputs() -> Iterator[tuple[Any, ...]]:
    """x, gate and before: rows of their own, and parts of wider ones; one of both on a CPU."""
    turn = itertools.cycle((True, False))
    for (rows, late, first), dtype in itertools.product(((3, 7, 3), (2, 130, 64)), DTYPES):
        apart = next(turn)
        x, gate = (torch.randn(2, rows, late, device=HERE).to(dtype) for _ in range(2))
        before = torch.randn(2, rows, first, device=HERE).to(dtype)
        if apart or HERE != "cpu":
            yield x, gate, before
        if not apart or HERE != "cpu":
            wide = torch.cat([before, x, gate], -1)
            yield tuple(wide.split([first, late, late], -1)[n] for n in (1, 2, 0))


def check_acted() -> None:
    """Every activation, with and without a gate and what stands before it."""
    from tenuto.runtime.kernels import quantize_after_triton as fused
    from tenuto.runtime.kernels.tiles_triton import Tiles

    some = (None, Tiles(1, 16, 0, 4), Tiles(2, 128, 128, 4))  # whole, in many parts, in two
    ways = list(itertools.product((True, False), (True, False), some))
    for number, (x, gate, before) in enumerate(gpu_inputs()):
        for shift, (act, dtype) in enumerate(itertools.product(ACTS, quantize_input.TYPES)):
            gated, joined, tiles = ways[(number + shift) % len(ways)]  # all come, of each of these
            g, b = gate if gated else None, before if joined else None
            found = fused.acted(b, x, g, act, dtype, tiles)
            right(found, reference_acted(b, x, g, act), dtype)


def check_normed() -> None:
    """Layer norms and root mean squares; factors of the model, and of an image or of all."""
    from tenuto.runtime.kernels import quantize_after_triton as fused
    from tenuto.runtime.kernels.tiles_triton import Tiles

    types = itertools.cycle(quantize_input.TYPES)
    ones, turn = itertools.cycle((True, False, False)), itertools.count()
    for (x, *_), centered in itertools.product(gpu_inputs(), (True, False)):
        width = x.shape[-1]
        own = Tiles(2, 128, 16, 4), Tiles(1, 4, 4, 4)
        able = [
            t for t in (None, *fused.whole_rows(width), *own) if t is None or t.n + t.k >= width
        ]
        weight, bias = torch.randn(2, width, device=HERE).to(x.dtype)
        rows = torch.randn(3, 2, 1, width, device=HERE).to(x.dtype)
        for given in (
            (None, None, None, None), (weight, bias, None, None), (None, None, rows[0], rows[1]),
            (weight, None, rows[0, :1], weight), (None, None, rows[2], None),
        ):  # fmt: skip
            dtype = next(types)
            one, some = next(ones), able[next(turn) % len(able)]
            found = fused.normed(x, *given, 1e-3, centered, dtype, one, some)
            case = some, one, centered, x.dtype, [t is not None for t in given]
            right(found, reference_normed(x, *given, 1e-3, centered, one), dtype, case)


CHECKS = check_acted, check_normed


@needs_triton
def test_the_kernels_are_right() -> None:
    in_triton("test_fused_rows")


def test_the_operations_are_what_torch_computes() -> None:
    """By plain operations, as on a CPU; the norms and activations are torch's own."""
    x, gate, before = (torch.randn(2, 5, 8) for _ in range(3))
    times, plus = torch.randn(2, 2, 1, 8)
    wanted = torch.cat([before, F.silu(x) * gate], -1)
    right(OPS.quantize_acted(before, x, gate, "silu", "int"), wanted, "int")
    wanted = F.gelu(x, approximate="tanh")
    right(OPS.quantize_acted(None, x, None, "gelu tanh", "e4m3"), wanted, "e4m3")
    wanted = F.layer_norm(x, (8,), None, None, 1e-6) * times + plus
    found = OPS.quantize_normed(x, None, None, times, plus, 1e-6, True, "int")
    right(found, wanted, "int")
    wanted = torch.rms_norm(x, (8,), gate[0, 0], 1e-6) * times
    found = OPS.quantize_normed(x, gate[0, 0], None, times, None, 1e-6, False, "e4m3")
    right(found, wanted, "e4m3")
    torch.library.opcheck(OPS.quantize_acted, (before, x, gate, "silu", "int"))
    torch.library.opcheck(OPS.quantize_normed, (x, None, None, times, plus, 1e-6, True, "e4m3"))


# --- the pass -------------------------------------------------------------------------------------


def names(module: fx.GraphModule) -> list[str]:
    """Our operations in a graph, in order, with the activation or the 1 of those that have one."""
    found = []
    for node in module.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and name.startswith("tenuto.quantize"):
            act = f" {node.args[3]}" if "acted" in name else ""
            act += " 1 +" if "normed" in name and node.args[8] else ""
            found.append(name.split(".")[1] + act)
    return found


def compiled(call: Call, *inputs: Any) -> tuple[list[str], Any]:
    """Our operations in the graph of a call after the pass, and what it gives."""
    seen: list[str] = []

    def keep(module: fx.GraphModule, given: Any) -> Any:
        fuse(module)
        seen.extend(names(module))
        return module.forward

    with torch.no_grad():
        return seen, torch.compile(call, backend=keep, fullgraph=True)(*inputs)


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return OPS.quantize_rows(x, "int")


X, Y, Z = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
T, P = X[:, :1] + 1, Y[:, :1]
W = Z[0, 0]
PLAIN = "quantize_rows"
CASES: dict[str, tuple[Call, list[str]]] = {
    "modulated": (
        lambda: rows(F.layer_norm(X, (8,), None, None, 1e-6) * (1 + T) + P),
        ["quantize_normed 1 +"],
    ),
    "a factor that is read twice": (
        lambda: (rows(F.layer_norm(X, (8,)) * (times := T + 1)), times), ["quantize_normed"],
    ),
    "twice the factor": (lambda: rows(F.layer_norm(X, (8,)) * (2 + T)), ["quantize_normed"]),
    "shift first": (lambda: rows(P + T * F.layer_norm(X, (8,))), ["quantize_normed"]),
    "affine": (lambda: rows(F.layer_norm(X, (8,), W, W)), ["quantize_normed"]),
    "root mean square": (lambda: rows(torch.rms_norm(X, (8,), W, 1e-6) * T), ["quantize_normed"]),
    "cast": (
        lambda: rows((F.layer_norm(X.float(), (8,)) * T).type_as(X).contiguous()),
        ["quantize_normed"],
    ),
    "dropout that is off": (
        lambda: rows(F.dropout(F.gelu(X), 0.5, False)), ["quantize_acted gelu"],
    ),
    "gated": (lambda: rows(F.silu(X) * Y), ["quantize_acted silu"]),
    "gated the other way": (lambda: rows(X * F.gelu(Y)), ["quantize_acted gelu"]),
    "joined": (
        lambda: rows(torch.cat([X, F.gelu(Y, approximate="tanh")], dim=2)),
        ["quantize_acted gelu tanh"],
    ),
    "joined and gated": (
        lambda: rows(torch.cat([Z, F.silu(X) * Y], dim=-1)), ["quantize_acted silu"],
    ),
    "twice": (lambda: (rows(F.silu(Y)), rows(F.silu(Y))), ["quantize_acted silu"] * 2),
    # what must stay as it is
    "dropout": (lambda: rows(F.dropout(F.gelu(X), 0.5, True)), [PLAIN]),
    "a row of each token": (lambda: rows(F.layer_norm(X, (8,)) * Y), [PLAIN]),
    "another dimension": (lambda: rows(torch.cat([X, F.silu(Y)], dim=1)), [PLAIN]),
    "three parts": (lambda: rows(torch.cat([X, Y, F.silu(Z)], dim=-1)), [PLAIN]),
    "two norms": (lambda: rows(F.layer_norm(X, (5, 8))), [PLAIN]),
    "a number's norm": (lambda: rows(torch.rms_norm(X, (8,))), [PLAIN]),
    "neither": (lambda: rows(X + Y), [PLAIN]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_taken_in(case: str) -> None:
    call, wanted = CASES[case]
    seen, found = compiled(call)
    assert seen == wanted
    if case == "dropout":
        return  # it is random
    for one, other in zip(tensors_in(found), tensors_in(call()), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1.001 if one.ndim == 3 else 1e-6)


def test_an_input_of_several_layers_is_quantized_once() -> None:
    def call() -> Any:
        x = F.layer_norm(X, (8,)) * T + P
        return rows(x), rows(x), rows(x)

    assert compiled(call)[0] == ["quantize_normed"]


def test_what_somebody_else_reads_stays() -> None:
    """Then it is computed anyway."""

    def call() -> Any:
        x = F.layer_norm(X, (8,)) * T + P
        return rows(x), x.sum()

    assert compiled(call)[0] == [PLAIN]


@pytest.mark.parametrize(
    "write", [lambda x: x.add_(1), lambda x: x.__iadd__(1), lambda x: torch.add(x, 1, out=x)]
)
def test_nothing_moves_over_a_write(write: Call) -> None:
    """An input that is written to after it was read is not read later, nor a quantized one kept."""

    def call(x: Tensor, y: Tensor) -> Any:
        z = F.silu(x)
        write(x)
        first = rows(z)
        early = rows(y)
        write(y)
        return first, early, rows(y)

    seen, found = compiled(call, X.clone(), Y.clone())
    assert seen == [PLAIN] * 3
    wanted = call(X.clone(), Y.clone())
    for one, other in zip(tensors_in(found), tensors_in(wanted), strict=True):
        assert torch.equal(one, other)


def test_a_graph_of_another_torch_is_compiled_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(module: fx.GraphModule) -> int:
        raise RuntimeError("nodes are no more")

    monkeypatch.setattr(compiler, "fuse", broken)
    call = torch.compile(lambda x: x + 1, backend=backend(backend="eager"))
    assert torch.equal(call(X), X + 1)
    assert "nodes are no more" in caplog.text


# --- models ---------------------------------------------------------------------------------------

FUSED = {  # of all blocks: what is taken in; what is left
    "sd": (15, 6), "flux": (11, 2), "sd3": (14, 3), "qwen-image": (8, 2), "wan": (4, 3),
}  # fmt: skip


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("scheme", ["fp8", "w8a8"])
def test_the_blocks_of_real_models(kind: str, scheme: str) -> None:
    """Norms and activations of the families go in, and the answer stays what it was."""
    pipe, prompts, call = tiny.asked(kind)
    denoiser = denoiser_of(pipe)
    trajectory = tn.record(pipe, prompts and prompts[:1], steps=2, call=call, batch=1)
    inputs = dict(trajectory.calls[0].inputs)
    seen: list[str] = []

    def keep(module: fx.GraphModule, given: Any) -> Any:
        seen.extend(names(module))
        return module.forward

    with tn.attach(denoiser, scheme, simulate=True, compile=True) as attached:
        (blocks,) = (p for p in attached.patches if isinstance(p, CompiledBlocks))
        blocks.options = {"backend": keep}
        with torch.no_grad():
            wanted, found = (next(iter(tensors_in(denoiser(**inputs)))) for _ in range(2))
        layers = [m for m in denoiser.modules() if isinstance(m, tn.runtime.QLayer)]
        assert any(layer.whole for layer in layers)
    taken = sum(name != PLAIN for name in seen)
    assert (taken, len(seen) - taken) == FUSED[kind]
    assert len(describe(denoiser).blocks) >= 2
    near = 0.03 if scheme == "fp8" else 0.01  # a tie that falls the other way moves a code by 6 %
    assert float((found - wanted).norm()) <= near * float(wanted.norm())


def test_layers_of_a_cpu_stay_plain_operations() -> None:
    """Its compiler fuses them well; kernels of a GPU are no gain there."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))

    def call(x: Tensor) -> Tensor:
        return input_memo.Memo().per_row(block(x), (-1,), "int", True)[1]

    assert compiled(call, X)[0] == []
    assert quantize_after.ACTS.keys() == {"none", "silu", "gelu", "gelu tanh"}


# --- compiled for a card --------------------------------------------------------------------------

POINTERS = {"codes_ptr": "*i8", "scale_ptr": "*fp32", "scales_ptr": "*fp32", "zeros_ptr": "*fp32",
            "index_ptr": "*i64", "zero_ptr": "*i32"}  # fmt: skip
INT = {"TOP": 127.0, "TINY": 1e-8, "WHOLE": True}
BUILDS: list[tuple[str, str, dict[str, Any]]] = [
    ("quantize_input_triton", "_rows", INT | {"ROWS": 2, "WIDE": 1024, "REST": 0}),
    ("quantize_input_triton", "_rows", INT | {"ROWS": 1, "WIDE": 1024, "REST": 128}),
    ("quantize_input_triton", "_rows",  # a size of 1 is a constant to the compiler
     INT | {"ROWS": 2, "WIDE": 1, "REST": 0, "columns": 1, "rows": 1}),
    ("quantize_input_triton", "_images", {"BLOCK": 1024}),
    ("quantize_input_triton", "_stored", {"BLOCK": 1024, "MOST": 448.0, "WHOLE": True}),
    *(("quantize_after_triton", "_normed",
       INT | dict.fromkeys(("CENTERED", "WEIGHT", "BIAS", "TIMES", "PLUS", "ONE"), True)
       | {"ROWS": 2, "WIDE": 1024, "REST": rest}) for rest in (0, 128)),
    *(("quantize_after_triton", "_acted",
       INT | {"ROWS": 1, "WIDE": 1024, "REST": rest, "PARTS": parts, "ACT": act}
       | {"GATED": True, "BEFORE": True, "QUICK": act != "silu"})
      for parts, rest, act in ((True, 0, "silu"), (False, 0, "gelu"), (False, 512, "gelu tanh"))),
]  # fmt: skip


def build(file: str, name: str, constants: dict[str, Any]) -> str:
    """The program of a kernel for an sm_80, which needs no GPU."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"tenuto.runtime.kernels.{file}"), name)
    assert all(p.name in constants for p in kernel.params if p.is_constexpr)
    types = {
        argument: "constexpr" if argument in constants
        else POINTERS.get(argument, "*bf16" if argument.endswith("_ptr") else
                          "fp32" if argument == "eps" else "i32")
        for argument in kernel.arg_names
    }  # fmt: skip
    given = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=given)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]


@needs_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Triton 3")  # of what its next versions do
def test_the_kernels_compile_for_a_card(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes more than the compiler does."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for file, name, constants in BUILDS:
        assert f".entry {name}" in build(file, name, constants), (file, name, constants)
