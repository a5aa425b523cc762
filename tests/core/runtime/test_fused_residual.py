"""What a block adds to its input goes into the product before it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from tenuto.model import tensors_in
from tenuto.runtime import compiler
from tenuto.runtime.fused_residual import finish
from tenuto.runtime.kernels import int8_fused
from tenuto.runtime.kernels.fp8_linear import Float8Linear, fp8_linear
from tests.core.runtime.test_joint_products import (
    COLUMNS,
    HERE,
    check_compiled,
    of_codes,
    of_floats,
    on_the_card,
)

OPS = torch.ops.tenuto
WIDTH = 48  # of the layer that is used

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # Inductor's advice for fp32
]


def layer(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    """A quantized layer as blocks have it."""
    if isinstance(packed, Float8Linear):
        return fp8_linear(*OPS.quantize_rows(x, "e4m3"), packed, bias, x.dtype)
    return int8_fused.fused_linear(*OPS.quantize_rows(x, "int"), 128, packed, bias, x.dtype)


def plain(x: Tensor, r: Tensor, g: Tensor, packed: Any, bias: Any) -> Tensor:
    return r + g[:, None] * layer(x, packed, bias)


def as_in_dit(x: Tensor, r: Tensor, g: Tensor, packed: Any, bias: Any) -> Tensor:
    y = F.dropout(layer(x, packed, bias), 0.0, training=False) / 1.0
    return g.unsqueeze(1) * y + r


def no_gate(x: Tensor, r: Tensor, g: Tensor, packed: Any, bias: Any) -> Tensor:
    return layer(x, packed, bias) + r


def one_gate(x: Tensor, r: Tensor, g: Tensor, packed: Any, bias: Any) -> Tensor:
    return r + layer(x, packed, bias) * g[0]


def by_heads(x: Tensor, r: Tensor, g: Tensor, packed: Any, bias: Any) -> Tensor:
    y = layer(x, packed, bias).unflatten(-1, (-1, 8))
    return r.unflatten(-1, (-1, 8)) + y


def read_twice(x: Tensor, r: Tensor, g: Tensor, packed: Any, bias: Any) -> Any:
    y = layer(x, packed, bias)
    return r + y, y.sum()


def gate_a_token(x: Tensor, r: Tensor, g: Tensor, packed: Any, bias: Any) -> Tensor:
    return r + x[..., :1] * layer(x, packed, bias)


def in_fp32(x: Tensor, r: Tensor, g: Tensor, packed: Any, bias: Any) -> Tensor:
    return r.float() + layer(x, packed, bias).float()


def halved(x: Tensor, r: Tensor, g: Tensor, packed: Any, bias: Any) -> Tensor:
    return r + layer(x, packed, bias) / 2


def shared(x: Tensor, r: Tensor, g: Tensor, packed: Any, bias: Any) -> Tensor:
    return r[:1] + layer(x, packed, bias)  # one for all images


TAKEN = (plain, as_in_dit, no_gate, one_gate)
LEFT = (by_heads, read_twice, gate_a_token, in_fp32, halved, shared)


def compiled(call: Any, *given: Any) -> tuple[int, list[str], Any]:
    """How many sums were taken in, our operations afterwards, and what the graph gives."""
    seen: list[Any] = []

    def keep(module: fx.GraphModule, inputs: Any) -> Any:
        count = finish(module)
        names = [str(n.target).split(".")[1] for n in module.graph.nodes
                 if str(n.target).startswith("tenuto.")]  # fmt: skip
        seen.extend((count, names))
        return module.forward

    with torch.no_grad():
        out = torch.compile(call, backend=keep, fullgraph=True)(*given)
    return seen[0], seen[1], out


def inputs(packed: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    dtype = torch.bfloat16 if isinstance(packed, Float8Linear) else torch.float32
    x, wide = torch.randn(2, 5, COLUMNS, device=HERE), torch.randn(2, 5, 2 * WIDTH, device=HERE)
    moves = torch.randn(2, 3 * WIDTH, device=HERE)
    return x.to(dtype), wide.to(dtype)[..., WIDTH:], moves.to(dtype).chunk(3, -1)[1]


def by_hand(kind: str, x: Tensor, packed: Any, bias: Any) -> Tensor:
    """The product in fp32, from the same codes."""
    codes, scale = OPS.quantize_rows(x, kind)
    y = codes.float() @ packed.weight.float() * packed.scale.view(-1) * scale
    return y if bias is None else y + bias.to(x.dtype if kind == "e4m3" else bias.dtype).float()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("call", TAKEN)
@pytest.mark.parametrize("make", [of_floats, of_codes])
def test_sums_that_are_taken_in(make: Any, call: Any, biased: bool) -> None:
    """One operation, whose answer is the sum of the exact product."""
    packed = make()[1]
    x, residual, gate = inputs(packed)
    bias = torch.randn(WIDTH, device=HERE) if biased else None
    count, names, found = compiled(call, x, residual, gate, packed, bias)
    kind = "fp8" if make is of_floats else "int8"
    assert (count, names[-1]) == (1, f"finished_{kind}") and "int8_fused" not in names
    y = by_hand("e4m3" if kind == "fp8" else "int", x, packed, bias)
    gates = {no_gate: torch.ones_like(gate[:, None]), one_gate: gate[0]}
    wanted = residual.float() + gates.get(call, gate[:, None]).float() * y
    rounding = 0.02 if kind == "fp8" else 1e-4
    assert found.dtype is x.dtype and found.shape == residual.shape
    assert torch.allclose(found.float(), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("call", LEFT)
def test_sums_that_are_left(call: Any) -> None:
    """What is no row of a gate an image, or is read elsewhere, or in another type."""
    packed = of_floats()[1]
    x, residual, gate = inputs(packed)
    count, _, found = compiled(call, x, residual, gate, packed, None)
    wanted = call(x, residual, gate, packed, None)
    assert count == 0
    for one, other in zip(tensors_in(found), tensors_in(wanted), strict=True):
        assert torch.allclose(one, other, rtol=0.02, atol=0.02)


def test_the_operations_in_graphs() -> None:
    """Their shapes and types are known without computing them (torch's check of what is written
    multiplies, which 8-bit floats cannot)."""
    tests = ("test_schema", "test_faketensor")
    for packed in (of_floats()[1], of_codes()[1]):
        x, residual, gate = inputs(packed)
        kind = "e4m3" if isinstance(packed, Float8Linear) else "int"
        codes, scale = (t.flatten(0, 1) for t in OPS.quantize_rows(x, kind))
        then = gate[:, None], residual
        if kind == "int":
            args: Any = codes, scale, None, *packed.tensors(), None, *then, x.dtype
            torch.library.opcheck(OPS.finished_int8.default, args, test_utils=tests)
        else:
            args = codes, scale, packed.weight, packed.scale, None, *then
            torch.library.opcheck(OPS.finished_fp8.default, args, test_utils=tests[1:])


@pytest.mark.skipif(HERE == "cpu", reason="there is no GPU, where products are 8-bit operations")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code")  # complex rotations
@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen-image"])
@pytest.mark.parametrize("scheme", ["fp8", "w8a8"])
def test_on_a_card(scheme: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks compiled with the pass give what they give without a compiler."""
    denoiser, given = on_the_card(kind)
    counts = SimpleNamespace(taken=0)

    def counted(module: fx.GraphModule) -> int:
        found = finish(module)
        counts.taken += found
        return found

    monkeypatch.setattr(compiler, "finish", counted)
    check_compiled(scheme, denoiser, given)
    assert counts.taken or scheme == "fp8", counts  # K and N of 16 at least
