"""Quantized weights, and the layers that compute with them."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.numerics import integer_codes
from tenuto.numerics.grid import Grid
from tenuto.numerics.qtensor import QTensor, layout
from tenuto.numerics.scheme import Format, Scheme, schemes
from tenuto.runtime.layers import QConv2d, QLayer, QLinear
from tenuto.sampling.clock import Clock

TIMES = (999, 499, 0)
FORMATS = [Format(b, symmetric=s) for b, s in itertools.product((2, 3, 4, 5, 7, 8), (True, False))]
FORMATS = [f for f in FORMATS if f.bits < 8 or f.symmetric]
FORMATS += [Format(bits, symmetric=False, group=16) for bits in (2, 3, 4)]
SHAPES = [(6, 32), (5, 33), (1, 1), (4, 3, 3, 3), (8, 2, 1, 1)]
ALL = [  # those of any weight; the others' layers are in runtime/test_native_layers.py
    s
    for s in vars(schemes).values()
    if isinstance(s, Scheme) and s.weight.dtype in ("int", "e4m3") and not s.weight.rotate
]
WITH_CODES = [s for s in ALL if s.activation is not None]
WHOLE = [s for s in WITH_CODES if s.weight.dtype == "int"]  # what a CPU executes


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: str, bias: bool = True) -> Any:
    """A Linear or Conv2d with random weights."""
    made: Any = {
        "linear": lambda: nn.Linear(33, 20, bias=bias),
        "conv": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=bias),
        "grouped": lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2, bias=bias),
        "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias),
    }[kind]()
    with torch.no_grad():
        for seed, p in enumerate(made.parameters()):
            p.copy_(draw(*p.shape, seed=seed) * 0.3)
    return made


def data(kind: str, batch: int = 3) -> Tensor:
    """An input for `layer(kind)`."""
    if kind == "linear":
        return draw(batch, 7, 33, seed=5)
    return draw(batch, 8 if kind == "grouped" else 6, 9, 9, seed=5)


def ranges(steps: int = len(TIMES)) -> tuple[Tensor, Tensor]:
    """One range per step, each twice as wide as the last."""
    width = 2.0 ** torch.arange(steps)
    return integer_codes.affine(-width, 1.5 * width, 8, symmetric=False)


def quantized(kind: str, scheme: Scheme, *, simulate: bool = False, **options: Any) -> Any:
    """`layer(kind)` in `scheme`, with a clock of its own unless one is given."""
    base = options.pop("base", None) or layer(kind, options.pop("bias", True))
    clock = options.pop("clock", None) or Clock(TIMES)
    static = scheme.activation is not None and not scheme.activation.dynamic
    given = options.pop("given", ranges()) if static else None
    weight = RoundToNearest().weight(base.weight, scheme.weight)
    made = QLinear if kind == "linear" else QConv2d
    return made(base, weight, scheme, clock, given, simulate)


# --- the weight -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", FORMATS, ids=lambda f: f"{f.bits}{'s' if f.symmetric else 'a'}{f.group}"
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_its_codes(form: Format, shape: tuple[int, ...]) -> None:
    """Every code that the format has, in storage and back, and through named tensors."""
    gen, columns = torch.Generator().manual_seed(1), math.prod(shape[1:])
    low, high = integer_codes.code_limits(form.bits, form.symmetric)
    count = math.ceil(columns / form.group) if form.group else 1
    zero, step = torch.zeros(shape[0], count), None
    if not form.symmetric:
        zero = torch.randint(low, high + 1, zero.shape, generator=gen).float()
    if form.group:
        step = torch.randint(1, 9, zero.shape, generator=gen).float()
    grid = Grid(torch.rand(shape[0], generator=gen) + 0.1, zero, step, form)
    codes = torch.randint(low, high + 1, (shape[0], columns), generator=gen).float()
    codes.view(-1)[0], codes.view(-1)[-1] = low, high
    levels = codes - grid.spread(zero, columns)
    q = QTensor.of(levels.view(shape), grid)
    steps = 1 if step is None else grid.spread(step, columns)
    assert torch.equal(q.levels().float(), levels.view(shape))
    assert torch.equal(q.codes().float(), (levels * steps).view(shape))
    assert torch.equal(q.qdata_of(q.codes()), q.qdata)
    expected = (levels * steps * grid.scale[:, None]).view(shape)
    assert torch.equal(q.dequantize(), expected)
    assert q.dequantize(torch.bfloat16).dtype is torch.bfloat16
    tensors = q.tensors("a.b")
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == layout("a.b", shape, form)
    again = QTensor.from_tensors(tensors, "a.b", list(shape), form)
    assert torch.equal(again.dequantize(), expected) and again.shape == shape
    assert torch.equal(q.to("cpu").dequantize(), expected)


def test_four_bits_take_half_a_byte() -> None:
    for form in (Format(4), Format(4, symmetric=False)):
        q = RoundToNearest().weight(draw(16, 64), form)
        assert q.qdata.numel() * q.qdata.element_size() == 16 * 32
    q = RoundToNearest().weight(draw(16, 64), Format(8))
    assert q.qdata.dtype is torch.int8 and q.zero_point is None


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.name)
def test_a_weight_is_near_the_one_it_stands_for(scheme: Scheme) -> None:
    w = draw(16, 3, 3, 3)
    gap = (RoundToNearest().weight(w, scheme.weight).dequantize() - w).norm() / w.norm()
    limits = {"int": 0.01, "e4m3": 0.04}  # three bits of mantissa: up to 2^-4 of a value
    assert gap < (limits[scheme.weight.dtype] if scheme.weight.bits == 8 else 0.15)


# --- the layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", WHOLE, ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_executed_equals_simulated(kind: str, scheme: Scheme, bias: bool) -> None:
    """The same codes; integer sums against float sums."""
    base, x = layer(kind, bias), data(kind)
    executed = quantized(kind, scheme, base=base)
    simulated = quantized(kind, scheme, base=base, simulate=True)
    assert executed.execution == "int8" and simulated.execution == "simulated"
    for t in TIMES:
        executed.clock.tick(t, range(3))
        simulated.clock.tick(t, range(3))
        one, other = executed(x), simulated(x)
        assert one.shape == other.shape == base(x).shape and one.dtype is other.dtype is x.dtype
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_what_no_kernel_takes_is_simulated() -> None:
    q = quantized("depthwise", schemes.W8A8)
    assert q.execution == "simulated"
    assert (q(data("depthwise")) - layer("depthwise")(data("depthwise"))).norm() < 0.5


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "depthwise"])
@pytest.mark.parametrize("scheme", [schemes.W8A16, schemes.W4A16], ids=lambda s: s.name)
def test_weight_only_is_the_layer_with_that_weight(kind: str, scheme: Scheme) -> None:
    q, base, x = quantized(kind, scheme), layer(kind), data(kind)
    with torch.no_grad():
        base.weight.copy_(q.qtensor().dequantize())
    assert q.execution == "weight-only"
    assert torch.equal(q(x), base(x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_reference_in_plain_words(kind: str) -> None:
    """Quantize and dequantize input and weight, then the float layer."""
    for scheme in (schemes.W8A8, schemes.W4A8_STATIC):
        q, base, x = quantized(kind, scheme), layer(kind), data(kind)
        q.clock.tick(499, range(3))
        if q.input_scale is None:
            dims = (-1,) if kind == "linear" else (1, 2, 3)
            step = x.abs().amax(dims, keepdim=True) / 127
            rounded = (x / step).round() * step
        else:
            pair = q.input_scale[1], q.input_zero[1]
            rounded = integer_codes.fake_quantize(x, *pair, 0, 255)
        with torch.no_grad():
            base.weight.copy_(q.qtensor().dequantize())
            assert torch.allclose(q(x), base(rounded), atol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_per_step_ranges_follow_the_clock(kind: str) -> None:
    x = data(kind) * 10  # beyond every range: the output grows with the range
    q = quantized(kind, schemes.W8A8_STATIC)
    sizes, outs = [], []
    for t in (999, 499, 0, 480, 1200):
        q.clock.tick(t, range(3))
        outs.append(q(x))
        sizes.append(float(outs[-1].detach().norm()))
    assert sizes[0] < sizes[1] < sizes[2]
    assert torch.equal(outs[3], outs[1]), "the nearest step"
    assert torch.equal(outs[4], outs[0])


def test_one_range_for_all_steps() -> None:
    q = quantized("linear", schemes.W8A8_STATIC, given=ranges(1))
    outs = []
    for t in TIMES:
        q.clock.tick(t, [0])
        outs.append(q(data("linear")))
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
@pytest.mark.parametrize("scheme", WITH_CODES, ids=lambda s: s.name)
def test_a_picture_is_itself_in_any_batch(kind: str, scheme: Scheme) -> None:
    q, x = quantized(kind, scheme), data(kind, batch=4)
    x[1] *= 50
    q.clock.tick(499, range(4))
    whole = q(x)
    for rows in ((0, 1), (3,), (2, 0, 1)):
        part = q(x[list(rows)])
        assert torch.allclose(part, whole[list(rows)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.name)
def test_a_cast_layer_computes_in_its_dtype(scheme: Scheme, dtype: torch.dtype) -> None:
    """A cast of the model must not round ranges, and codes stay codes."""
    for bias in (True, False):
        q, x = quantized("linear", scheme, bias=bias), data("linear")
        q.clock.tick(499, range(3))
        scale, codes = q.weight_scale.clone(), q.qdata.clone()
        before = q(x)
        q.to(dtype)
        assert torch.equal(q.weight_scale, scale) and q.weight_scale.dtype is torch.float32
        assert torch.equal(q.qdata, codes) and q.qdata.dtype is codes.dtype
        assert q.input_scale is None or q.input_scale.dtype is torch.float32
        out = q(x.to(dtype))
        assert out.dtype is dtype and q.weight.dtype is dtype
        assert (out.float() - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize("simulate", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_deep_copy_computes_the_same_by_a_clock_of_its_own(kind: str, simulate: bool) -> None:
    for scheme in ALL:
        q, x = quantized(kind, scheme, simulate=simulate), data(kind)
        q.clock.tick(499, range(3))
        before = q(x)  # packs, where it packs
        twin = copy.deepcopy(q)
        assert twin.clock is not q.clock
        assert not twin.packed_tensors(), "a cache is not copied"
        assert torch.equal(twin(x), before)
        q.clock.tick(0, range(3))
        assert torch.equal(twin(x), before), "the copy stays at its step"
        twin.clock.tick(0, range(3))
        assert torch.equal(twin(x), q(x))
        places = {t.data_ptr() for t in q.state_dict().values() if t.numel()}
        assert not places & {t.data_ptr() for t in twin.state_dict().values()}, "shared memory"


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.name)
def test_state_is_kept(scheme: Scheme) -> None:
    """What `state_dict` holds is the whole layer, and caches are no part of it."""
    q, x = quantized("linear", scheme), data("linear")
    q.clock.tick(499, range(3))
    expected = q(x)
    state = {k: v.clone() for k, v in q.state_dict().items()}
    assert {"qdata", "weight_scale", "bias"} <= state.keys()
    other = quantized("linear", scheme, base=nn.Linear(33, 20), clock=q.clock)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), expected)


def test_memory_is_not_held_twice() -> None:
    """Once packed, the packed weight is the only copy, and yet all of it can be had back."""
    for scheme in WHOLE:
        q = quantized("linear", scheme)
        weight, codes = q.weight, q.qdata.clone()
        q(data("linear"))
        assert q.qdata.numel() == 0 and q.packed_tensors()
        assert torch.equal(q.weight, weight)
        assert torch.equal(q.state_dict()["qdata"], codes)
        assert not q.packed_tensors()


def test_new_codes_are_packed_anew() -> None:
    """A layer that has run, and then loads other weights, computes with the new ones."""
    q, x = quantized("linear", schemes.W8A8), data("linear")
    q(x)
    other = quantized("linear", schemes.W8A8, base=nn.Linear(33, 20))
    q.load_state_dict(other.state_dict())
    assert torch.equal(q(x), other(x))


def test_the_caller_keeps_the_layer() -> None:
    base = layer("linear")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    q = quantized("linear", schemes.W8A8, base=base)
    q(data("linear"))
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert base.training == q.training
    assert quantized("linear", schemes.W8A8, base=layer("linear").eval()).training is False


def test_hosts_find_weight_and_bias_by_name() -> None:
    """LoRA loaders and dtype checks look at them."""
    for kind in ("linear", "conv"):
        base = layer(kind)
        q = quantized(kind, schemes.W4A8, base=base)
        assert q.weight.shape == base.weight.shape and q.weight.dtype is base.weight.dtype
        assert q.bias is base.bias
        assert isinstance(q, QLayer)


def test_old_diffusers_pass_a_scale() -> None:
    q, x = quantized("linear", schemes.W8A8), data("linear")
    assert torch.equal(q(x, 1.0), q(x))


def test_gradients_reach_the_input_of_a_weight_only_layer() -> None:
    """Router training differentiates through the denoiser."""
    q, x = quantized("linear", schemes.W8A16), data("linear").requires_grad_(True)
    q(x).sum().backward()
    expected = F.linear(torch.ones(3, 7, 20), q.weight.t())
    assert x.grad is not None and torch.allclose(x.grad, expected, atol=1e-5)


def test_compiled_it_follows_the_clock_without_compiling_again() -> None:
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounter

    reset()
    counter = CompileCounter()
    q, x = quantized("linear", schemes.W8A8_STATIC, simulate=True), data("linear")
    q(x)  # what it caches is there
    compiled = torch.compile(q, backend=counter, fullgraph=True)
    for t in TIMES:
        q.clock.tick(t, range(3))
        assert torch.allclose(compiled(x), q(x), atol=1e-6)
    assert counter.frame_count == 1
    reset()
