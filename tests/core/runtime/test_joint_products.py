"""Products of one input as one: weights side by side, the operations, and the pass over a graph."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import tenuto as tn
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.model import denoiser_of, tensors_in
from tenuto.numerics import float8
from tenuto.runtime import compiler
from tenuto.runtime.joint_products import join
from tenuto.runtime.kernels import joint_linear
from tenuto.runtime.kernels.fp8_linear import BY_ROW, Float8Linear, fp8_linear
from tenuto.runtime.kernels.int8_fused import fused_linear
from tenuto.runtime.kernels.int8_linear import IntLinear
from tests.core import tiny_pipelines as tiny
from tests.core.runtime.test_triton_kernels import HERE, in_triton, needs_triton

OPS = torch.ops.tenuto
COLUMNS, SIZES = 32, (16, 48, 16)


pytestmark = pytest.mark.usefixtures("fresh")


def of_floats(seed: int = 0) -> list[Float8Linear]:
    """Packed weights of three layers."""
    torch.manual_seed(seed)
    weights = [torch.randn(n, COLUMNS, device=HERE) for n in SIZES]
    return [Float8Linear(float8.cast(w), w[:, 0].abs() + 0.5, BY_ROW) for w in weights]


def of_codes(seed: int = 0) -> list[IntLinear]:
    torch.manual_seed(seed)
    weights = [torch.randn(n, COLUMNS, device=HERE) for n in SIZES]
    made = [RoundToNearest().weight(w, tn.schemes.W8A8.weight) for w in weights]
    return [IntLinear(q.codes(), q.scale) for q in made]


@pytest.mark.parametrize("make", [of_floats, of_codes])
def test_packed_weights_lie_side_by_side(make: Any) -> None:
    """Each is what it was, as a view; a second time nothing moves."""
    packed, wanted = make(), make()
    assert joint_linear.beside([p.weight.t() for p in packed]) is None
    assert joint_linear.lay(packed) and not joint_linear.lay(packed)
    for one, other in zip(packed, wanted, strict=True):
        for mine, its in zip(one.tensors(), other.tensors(), strict=True):
            assert mine.shape == its.shape and torch.equal(mine.float(), its.float())
        assert torch.equal(one.codes().float(), other.codes().float())
    whole = joint_linear.beside([p.codes() for p in packed])
    assert whole is not None and whole.shape == (sum(SIZES), COLUMNS)
    assert torch.equal(whole.float(), torch.cat([p.codes().float() for p in wanted]))
    assert joint_linear.beside([p.codes() for p in packed[::-1]]) is None, "in their order alone"
    assert joint_linear.beside([packed[0].codes(), packed[2].codes()]) is None, "with no gap"


def check_codes() -> None:
    """The joint operation of whole codes is the single ones, wherever the weights lie."""
    x = torch.randint(-127, 128, (5, COLUMNS), device=HERE, dtype=torch.int8)
    scale = torch.rand(5, 1, device=HERE) + 0.1
    bias = torch.randn(sum(SIZES), device=HERE)
    for given in (bias, None):
        packed = of_codes()
        parts = given.split(SIZES) if given is not None else [None] * 3
        wanted = torch.cat(
            [fused_linear(x, scale, 128, p, b, torch.float32)
             for p, b in zip(packed, parts, strict=True)], -1,
        )  # fmt: skip
        for _ in range(2):
            lists = [list(t) for t in zip(*(p.tensors() for p in packed), strict=True)]
            found = OPS.joint_int8(x, scale, None, *lists, given, torch.float32)
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-4)
            joint_linear.lay(packed)


CHECKS = (check_codes,)


@needs_triton
def test_the_operation_of_whole_codes() -> None:
    in_triton("test_joint_products")


def product(x: Tensor, packed: Float8Linear, bias: Tensor | None) -> Tensor:
    codes, scale = OPS.quantize_rows(x, "e4m3")
    return fp8_linear(codes, scale, packed, bias, torch.bfloat16)


def attention(x: Tensor, packed: list[Float8Linear], bias: list[Any]) -> Any:
    """As an attention reads it: by heads."""
    q, k, v = (product(x, p, b).unflatten(-1, (-1, 8)) for p, b in zip(packed, bias, strict=True))
    return q, k.transpose(1, 2), v + 1


def compiled(call: Any, *given: Any) -> tuple[list[str], Any]:
    """The products in the graph of a call after the passes, and what it gives."""
    seen: list[str] = []

    def keep(module: fx.GraphModule, inputs: Any) -> Any:
        words = [str(n.target).split(".")[1] for n in module.graph.nodes
                 if "joint" in str(n.target)]  # fmt: skip
        seen.extend(words + ["single" for n in module.graph.nodes if n.target is torch._scaled_mm])
        return module.forward

    with torch.no_grad():
        made = torch.compile(call, backend=compiler.backend(backend=keep), fullgraph=True)
        return seen, made(*given)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_products_of_one_input_are_one(side_by_side: bool, biased: bool) -> None:
    """If their weights lie so when the block is compiled; the answer is the same."""
    packed, x = of_floats(), torch.randn(2, 5, COLUMNS, device=HERE).bfloat16()
    bias = [torch.randn(n, device=HERE) if biased else None for n in SIZES]
    if side_by_side:
        joint_linear.lay(packed)
    seen, found = compiled(attention, x, packed, bias)
    assert seen == (["joint_fp8"] if side_by_side else ["single"] * 3)
    for one, other in zip(found, attention(x, packed, bias), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=0.02, atol=0.02)


def test_other_inputs_have_products_of_their_own() -> None:
    """Cross-attention: the query is of the image, key and value are of the text."""
    packed, text = of_floats(), torch.randn(1, 3, COLUMNS, device=HERE).bfloat16()
    x = torch.randn(1, 5, COLUMNS, device=HERE).bfloat16()
    joint_linear.lay(packed)

    def call(x: Tensor, text: Tensor) -> Any:
        return product(x, packed[0], None), *(product(text, p, None) for p in packed[1:])

    seen, found = compiled(call, x, text)
    assert seen == ["joint_fp8", "single"]
    for one, other in zip(found, call(x, text), strict=True):
        assert torch.allclose(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("biased", [True, False])
def test_weights_that_went_apart_are_computed_one_by_one(biased: bool) -> None:
    """A code is compiled once for equal blocks, and weights are packed anew when a model moves."""
    x = torch.randn(5, COLUMNS, device=HERE).to(torch.float8_e4m3fn)
    scale = torch.rand(5, 1, device=HERE) + 0.1
    bias = torch.randn(sum(SIZES), device=HERE).bfloat16() if biased else None
    packed = of_floats()
    answers = []
    for _ in range(2):
        lists = [p.weight for p in packed], [p.scale for p in packed]
        answers.append(OPS.joint_fp8(x, scale, *lists, bias, torch.bfloat16))
        joint_linear.lay(packed)
    assert torch.allclose(*answers, rtol=0.02, atol=0.02)
    parts = torch.cat([fp8_linear(x, scale, p, None, torch.bfloat16) for p in packed], -1)
    wanted = parts if bias is None else parts + bias
    assert torch.allclose(answers[0], wanted, rtol=0.02, atol=0.05)


def on_the_card(kind: str) -> tuple[Any, dict[str, Any]]:
    """A small denoiser in bf16 on the card, and a recorded call of it."""
    pipe, prompts, call = tiny.asked(kind)
    trajectory = tn.record(pipe, prompts and prompts[:1], steps=2, call=call, batch=1)
    denoiser = denoiser_of(pipe).to("cuda", torch.bfloat16)

    def there(x: Tensor) -> Tensor:
        return x.to("cuda", torch.bfloat16 if x.is_floating_point() else x.dtype)

    return denoiser, tn.model.map_tensors(there, dict(trajectory.calls[0].inputs))


def check_compiled(scheme: str, denoiser: Any, call: dict[str, Any]) -> None:
    """The first call runs as it is, the next ones compiled, and then in a graph."""
    with tn.attach(denoiser, scheme, execution="int8", compile=True), torch.no_grad():
        first, *rest = (next(iter(tensors_in(denoiser(**call)))).float() for _ in range(3))
    for other in rest:
        assert float((first - other).norm()) < 0.05 * float(first.norm())


@pytest.mark.skipif(HERE == "cpu", reason="there is no GPU, where weights are laid side by side")
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("kind", ["sd", "flux", "sd3"])
@pytest.mark.parametrize("scheme", ["fp8", "w8a8"])
def test_on_a_card(scheme: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks compiled with both passes give what they give in eager mode; products are joined."""
    denoiser, inputs = on_the_card(kind)
    counts = SimpleNamespace(fused=0, joined=0)
    fuse = compiler.fuse

    def counted_fuse(module: fx.GraphModule) -> int:
        found = fuse(module)
        counts.fused += found
        return found

    def counted_join(module: fx.GraphModule, given: Any) -> int:
        found = join(module, given)
        counts.joined += found
        return found

    monkeypatch.setattr(compiler, "fuse", counted_fuse)
    monkeypatch.setattr(compiler, "join", counted_join)
    check_compiled(scheme, denoiser, inputs)
    assert counts.fused and (counts.joined or scheme == "fp8"), counts  # K and N of 16 at least
