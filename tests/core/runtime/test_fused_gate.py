"""What a gated feed-forward makes of its first layer goes into that layer's product."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from tenuto.model import tensors_in
from tenuto.runtime import compiler
from tenuto.runtime.fused_gate import gate
from tenuto.runtime.fused_rows import fuse
from tenuto.runtime.kernels.fp8_linear import Float8Linear
from tenuto.runtime.kernels.gated_product import reference
from tests.core.runtime.test_fused_residual import by_hand, layer
from tests.core.runtime.test_joint_products import (
    COLUMNS,
    HERE,
    check_compiled,
    of_codes,
    of_floats,
    on_the_card,
)
from tests.core.runtime.test_triton_kernels import DTYPES, in_triton, near, needs_triton

OPS = torch.ops.tenuto

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # Inductor's advice for fp32
]


def geglu(x: Tensor, packed: Any, bias: Any) -> Tensor:
    """As diffusers has it in the feed-forwards of SD and SDXL."""
    value, gate = layer(x, packed, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def tanh_by_parts(x: Tensor, packed: Any, bias: Any) -> Tensor:
    y = layer(x, packed, bias)
    value, gate = torch.split(y, y.shape[-1] // 2, -1)
    return F.gelu(gate, approximate="tanh") * value


def swiglu(x: Tensor, packed: Any, bias: Any) -> Tensor:
    """As in FLUX.2: the gate comes first."""
    first, second = layer(x, packed, bias).chunk(2, -1)
    return F.silu(first) * second


TAKEN = {geglu: ("gelu", False), tanh_by_parts: ("gelu tanh", False), swiglu: ("silu", True)}


def read_twice(x: Tensor, packed: Any, bias: Any) -> Any:
    y = layer(x, packed, bias)
    value, gate = y.chunk(2, -1)
    return value * F.gelu(gate), y.sum()


def half_read_twice(x: Tensor, packed: Any, bias: Any) -> Any:
    value, gate = layer(x, packed, bias).chunk(2, -1)
    return value * F.gelu(gate), value.sum()


def uneven(x: Tensor, packed: Any, bias: Any) -> Any:
    value, gate, _ = torch.split(layer(x, packed, bias), (16, 16, 16), -1)
    return value * F.gelu(gate)


def along_tokens(x: Tensor, packed: Any, bias: Any) -> Tensor:
    value, gate = layer(x, packed, bias)[:, :4].chunk(2, 1)
    return value * F.silu(gate)


def by_heads(x: Tensor, packed: Any, bias: Any) -> Tensor:
    value, gate = layer(x, packed, bias).unflatten(-1, (-1, 8)).chunk(2, -1)
    return value * F.silu(gate)


def of_itself(x: Tensor, packed: Any, bias: Any) -> Tensor:
    value, _ = layer(x, packed, bias).chunk(2, -1)
    return value * F.silu(value)


def written_to(x: Tensor, packed: Any, bias: Any) -> Tensor:
    y = layer(x, packed, bias)
    value, gate = y.chunk(2, -1)
    acted = F.silu(gate)
    y += 1.0
    return value * acted


LEFT = (read_twice, half_read_twice, uneven, along_tokens, by_heads, of_itself, written_to)


def compiled(call: Any, *given: Any) -> tuple[int, list[str], Any]:
    """How many halves were taken in, our operations afterwards, and what the graph gives."""
    seen: list[Any] = []

    def keep(module: fx.GraphModule, inputs: Any) -> Any:
        fuse(module)
        count = gate(module)
        names = [str(n.target).split(".")[1] for n in module.graph.nodes
                 if str(n.target).startswith("tenuto.")]  # fmt: skip
        for node in module.graph.nodes:  # as `early_part.py` reads them
            known = node.meta.get("example_value")
            seen_shape = getattr(known, "shape", None)
            assert seen_shape is None or len(seen_shape) == known.ndim
        seen.extend((count, names))
        return module.forward

    with torch.no_grad():
        out = torch.compile(call, backend=keep, fullgraph=True)(*given)
    return seen[0], seen[1], out


def given(packed: Any) -> Tensor:
    torch.manual_seed(1)
    dtype = torch.bfloat16 if isinstance(packed, Float8Linear) else torch.float32
    return torch.randn(2, 5, COLUMNS, device=HERE).to(dtype)


def kind_of(make: Any) -> tuple[str, str]:
    return ("fp8", "e4m3") if make is of_floats else ("int8", "int")


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("call", TAKEN)
@pytest.mark.parametrize("make", [of_floats, of_codes])
def test_halves_that_are_taken_in(make: Any, call: Any, biased: bool) -> None:
    """One operation, whose answer is that of the exact product."""
    packed = make()[1]
    x = given(packed)
    bias = torch.randn(packed.weight.shape[1], device=HERE) if biased else None
    count, names, found = compiled(call, x, packed, bias)
    name, kind = kind_of(make)
    assert (count, names) == (1, ["quantize_rows", f"gated_{name}"])
    wanted = reference(by_hand(kind, x, packed, bias), *TAKEN[call])
    rounding = 0.03 if name == "fp8" else 1e-4
    assert found.dtype is x.dtype and found.shape == wanted.shape
    assert torch.allclose(found.float(), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("call", TAKEN)
@pytest.mark.parametrize("make", [of_floats, of_codes])
def test_codes_are_made_with_them(make: Any, call: Any) -> None:
    """Where the next layer is quantized: its product is that of the same codes, or a step off."""
    packed, (name, kind) = make()[1], kind_of(make)

    def block(x: Tensor, packed: Any) -> Any:
        return OPS.quantize_rows(call(x, packed, None), kind)

    x = given(packed)
    count, names, (codes, scale) = compiled(block, x, packed)
    assert (count, names) == (1, ["quantize_rows", f"gated_{name}_rows"])
    assert codes.shape[:-1] == scale.shape[:-1] == x.shape[:-1] and scale.shape[-1] == 1
    wanted = reference(by_hand(kind, x, packed, None), *TAKEN[call])
    found = codes.float() * scale
    assert float((found - wanted).norm() / wanted.norm()) < (0.05 if name == "fp8" else 0.01)


@pytest.mark.parametrize("call", LEFT)
def test_halves_that_are_left(call: Any) -> None:
    """What is read elsewhere or written to, no halves, or halves of something else."""
    packed = of_floats()[1]
    x = given(packed)
    count, _, found = compiled(call, x, packed, None)
    assert count == 0
    for one, other in zip(tensors_in(found), tensors_in(call(x, packed, None)), strict=True):
        assert torch.allclose(one, other, rtol=0.02, atol=0.02)


def test_images_of_any_size() -> None:
    """One graph for all of them, where the number of tokens is a symbol."""
    packed, counts = of_codes()[1], []

    def keep(module: fx.GraphModule, inputs: Any) -> Any:
        fuse(module)
        counts.append(gate(module))
        return module.forward

    one: Any = torch.compile(geglu, backend=keep, fullgraph=True)
    with torch.no_grad():
        for rows in (5, 7, 9):
            x = torch.randn(2, rows, COLUMNS, device=HERE)
            torch._dynamo.mark_dynamic(x, 1)
            found = one(x, packed, None)
            wanted = reference(by_hand("int", x, packed, None), "gelu", False)
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert counts == [1]


def test_the_operations_in_graphs() -> None:
    """Their shapes and types are known without computing them (torch's check of what is written
    multiplies, which 8-bit floats cannot)."""
    tests = ("test_schema", "test_faketensor")
    for packed in (of_floats()[1], of_codes()[1]):
        x, floats = given(packed), isinstance(packed, Float8Linear)
        kind = "e4m3" if floats else "int"
        codes, scale = (t.flatten(0, 1) for t in OPS.quantize_rows(x, kind))
        then = "silu", True, x.dtype
        if floats:
            args: Any = codes, scale, packed.weight, packed.scale, None, *then
        else:
            args = codes, scale, None, *packed.tensors(), None, *then
        name = "gated_fp8" if floats else "gated_int8"
        tests = tests[1:] if floats else tests
        torch.library.opcheck(getattr(OPS, name).default, args, test_utils=tests)
        more = getattr(OPS, f"{name}_rows").default
        torch.library.opcheck(more, (*args, kind), test_utils=tests)
        tests = ("test_schema", "test_faketensor")


def check_gated() -> None:
    """Odd shapes, both orders, every activation and way of loading; whole codes and e4m3."""
    from tenuto.runtime.kernels import gated_product_triton as fused
    from tenuto.runtime.kernels.tiles_triton import Tiles

    few = (
        Tiles(16, 16, 32, group=2), Tiles(16, 32, 32, persistent=True, group=3),
        Tiles(32, 16, 32, tma=True), Tiles(16, 16, 64, tma=True, persistent=True),
    )  # fmt: skip
    acts = itertools.cycle(("gelu", "gelu tanh", "silu"))
    turns = itertools.cycle(itertools.product((True, False), (True, False), (True, False)))
    for (m, n, k), tiles in itertools.product([(1, 1, 16), (17, 33, 40), (70, 21, 48)], few):
        if tiles.tma and k % 16:
            continue
        (first, whole, biased), act, dtype = next(turns), next(acts), DTYPES[m % 3]
        x = torch.randint(-127, 128, (m, k), device=HERE).to(torch.int8)
        codes = torch.randint(-127, 128, (2 * n, k), device=HERE).to(torch.int8)
        if not whole:
            x, codes = (t.float().div(32).to(torch.float8_e4m3fn) for t in (x, codes))
        scale, w_scale = torch.rand(m, 1, device=HERE) / k, torch.rand(2 * n, device=HERE) / 9
        bias = torch.randn(2 * n, device=HERE).to(dtype) if biased else None
        sums = codes.sum(1, dtype=torch.int32) if whole else None
        zero = torch.tensor([37], dtype=torch.int32, device=HERE) if whole and m > 1 else None
        y = (x.double() - (0 if zero is None else zero - 128)) @ codes.double().T * w_scale * scale
        y = y if bias is None else y + bias.double()
        value, other = y.chunk(2, -1)[::-1] if first else y.chunk(2, -1)
        kinds = {"none": F.gelu, "silu": F.silu}
        acted = kinds.get(act, lambda t, a=act: F.gelu(t, approximate="tanh" if a[4:] else "none"))
        given = x, scale, zero, codes, w_scale, sums, bias, act, first, dtype, tiles
        near(fused.linear(*given), value * acted(other), dtype)
        y = y.to(dtype)
        wanted = reference(y, act, first).double()
        near(fused.gated(y, act, first), wanted, dtype)


CHECKS = (check_gated,)


@needs_triton
def test_the_kernels_equal_their_references() -> None:
    in_triton("test_fused_gate")


@pytest.mark.skipif(HERE == "cpu", reason="there is no GPU, where products are 8-bit operations")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheme", ["fp8", "w8a8"])
def test_on_a_card(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks compiled with the pass give what they give without a compiler."""
    denoiser, inputs = on_the_card("sdxl")
    counts = SimpleNamespace(taken=0)

    def counted(module: fx.GraphModule) -> int:
        found = gate(module)
        counts.taken += found
        return found

    monkeypatch.setattr(compiler, "gate", counted)
    check_compiled(scheme, denoiser, inputs)
    assert counts.taken or scheme == "fp8", counts  # K and N of 16 at least
