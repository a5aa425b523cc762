"""Int8, float, or whichever is not clearly slower: what decides, and what must hold in each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import TenutoError, attach, schemes
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.measure.memory import resident_weight_bytes
from tenuto.model import describe
from tenuto.model.backbone import layers
from tenuto.numerics.scheme import Scheme
from tenuto.runtime.attachment import quantized as quantized_copy
from tenuto.runtime.denoiser_call import CompiledBlocks
from tenuto.runtime.execution import DENSE, INT8, Chooser
from tenuto.runtime.layers import QConv2d, QLayer, QLinear
from tenuto.sampling.clock import Clock

MADE_OF_TIME = Chooser.__call__  # before conftest makes it answer int8


class Says:
    """A chooser whose answer is a function of the kind; it never runs what it is given."""

    def __init__(self, answer: Callable[[Any], str]) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, kind: Hashable, runs: Any) -> str:
        self.asked.append(kind)
        return self.answer(kind)

    def __deepcopy__(self, memo: Any) -> Says:
        return self


class FakeTime:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("int8", "expected"), [(0.5, INT8), (1.1, INT8), (1.2, DENSE)])
def test_int8_is_left_where_it_is_clearly_slower(
    int8: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same kind is not timed a second time, whatever it would cost then."""
    monkeypatch.setattr(Chooser, "__call__", MADE_OF_TIME)
    time, runs = FakeTime(), []
    monkeypatch.setattr("tenuto.runtime.timing.time", time)

    def run(name: str, seconds: float) -> None:
        runs.append(name)
        time.now += seconds + (100 if len(runs) == 6 else 0)  # one hiccup

    chooser = Chooser()
    for _ in range(2):
        runs_of = {INT8: lambda: run("a", int8), DENSE: lambda: run("b", 1.0)}
        assert chooser("kind", runs_of) == expected
    assert runs.count("a") == runs.count("b") == chooser.repeats + 2
    slow = {INT8: lambda: run("a", 9.0), DENSE: lambda: run("b", 1.0)}
    assert chooser("other", slow) == DENSE
    quick = {INT8: slow[INT8], "quick": lambda: run("c", 1.1), DENSE: slow[DENSE]}
    assert chooser("another", quick) == "quick", "the fastest of the kernels"
    assert copy.deepcopy(chooser) is chooser


def test_it_really_times_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it finds, the layer computes as it says."""
    monkeypatch.setattr(Chooser, "__call__", MADE_OF_TIME)
    chooser = Chooser()
    q = made("linear", wanted="auto", chooser=chooser)
    x = torch.randn(5, 32, requires_grad=True)
    y = q(x)
    assert q.execution in (INT8, DENSE)
    assert list(chooser.known.values()) == [DENSE if q.execution == DENSE else "int8_linear"]
    assert torch.equal(y, made("linear", wanted="int8" if q.execution == INT8 else "float")(x))


# --- one layer ------------------------------------------------------------------------------------


def made(kind: str = "linear", scheme: Scheme = schemes.W8A8, **options: Any) -> Any:
    """A quantized layer with weights of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        groups = 8 if kind == "depthwise" else 1
        base: Any = nn.Linear(32, 24) if kind == "linear" else nn.Conv2d(8, 8, 3, groups=groups)
    weight = RoundToNearest().weight(base.weight, scheme.weight)
    layer = QLinear if kind == "linear" else QConv2d
    return layer(base, weight, scheme, Clock((999, 0)), **options)


def data(kind: str, batch: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(batch)
    return torch.randn((batch, 4, 32) if kind == "linear" else (batch, 8, 6, 6), generator=draw)


def dense(q: Any) -> nn.Module:
    """The float layer with the weight that `q` stands for."""
    layer: Any = nn.Linear(32, 24) if isinstance(q, QLinear) else nn.Conv2d(8, 8, 3)
    layer.weight = nn.Parameter(q.qtensor().dequantize(q.dtype))
    layer.bias = q.bias
    return layer


@pytest.mark.parametrize("scheme", [schemes.W8A8, schemes.W4A8], ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_in_float_it_is_the_layer_with_that_weight(kind: str, scheme: Scheme) -> None:
    """And nothing of it is packed; the codes stay, the copy is counted."""
    for options in (
        {"wanted": "float"},
        {"wanted": "auto", "chooser": Says(lambda kind: DENSE)},
    ):
        q, x = made(kind, scheme, **options), data(kind)
        before = resident_weight_bytes(q)
        assert torch.equal(q(x), dense(q)(x))
        assert q.execution == DENSE and q.qdata.numel()
        copied = 4 * q.weight.numel()
        assert resident_weight_bytes(q) == before + copied
        assert [t.dtype for t in q.packed_tensors()] == [torch.float32]
        low = x.bfloat16()
        q.to(torch.bfloat16)
        assert q(low).dtype is torch.bfloat16  # packed: its sums may round to the neighbour
        torch.testing.assert_close(q(low), dense(q)(low), rtol=2**-7, atol=2**-7)
        assert resident_weight_bytes(q) < before + copied


def test_a_weight_in_float_lies_in_memory_as_the_layers_own() -> None:
    """Channels last, where the model is so or is moved so: cuDNN would turn it at every call."""
    layer = nn.Conv2d(8, 8, 3)
    weight = RoundToNearest().weight(layer.weight, schemes.W8A8.weight)

    def order(q: QConv2d) -> bool:
        q(data("conv"))
        kept = q.packed_tensors()[0]
        assert q.weight.stride() == kept.stride()
        return kept.stride(1) == 1

    own: Any = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    q: Any = QConv2d(own, weight, schemes.W8A8, Clock((0,)), wanted="float")
    assert order(q) and order(q.to("cpu")) and order(copy.deepcopy(q))
    assert not order(q.to(memory_format=torch.contiguous_format))
    assert not order(q.float()) and order(q.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_one_choice_for_about_so_many_rows(kind: str) -> None:
    """A large call in int8, a small one in float, and each is what it would be alone."""
    chooser = Says(lambda kind: INT8 if 9 in kind else DENSE)  # 256 rows and more
    q = made(kind, wanted="auto", chooser=chooser)
    assert q.execution == "auto"
    small, large = data(kind, 2), data(kind, 70 if kind == "linear" else 8)
    for _ in range(2):
        assert torch.equal(q(small), made(kind, wanted="float")(small))
        assert torch.equal(q(large), made(kind)(large))
    assert len(chooser.asked) == 2 and q.execution == "int8 or dequantized"
    assert len(q.packed_tensors()) > 1, "both are kept, and counted"
    twin = copy.deepcopy(q)
    assert torch.equal(twin(small), q(small)) and torch.equal(twin(large), q(large))
    assert len(chooser.asked) == 2, "a copy decides as the original did"
    q.to(torch.bfloat16)
    q(small.bfloat16())
    assert len(chooser.asked) == 3, "another dtype is another choice"


def test_layers_that_are_alike_are_asked_for_alike() -> None:
    def kind(*args: Any, x: Tensor | None = None, **options: Any) -> Any:
        chooser = Says(lambda kind: INT8)
        layer = made(*args, wanted="auto", chooser=chooser, **options)
        layer(data(args[0]) if x is None else x)
        return chooser.asked[0]

    assert kind("linear") == kind("linear") and kind("conv") == kind("conv")
    others = [
        kind("linear"), kind("conv"), kind("linear", schemes.W4A8),
        kind("linear", x=data("linear", 30)), kind("linear", x=data("linear").bfloat16()),
    ]  # fmt: skip
    assert len(set(others)) == len(others)


def test_what_no_kernel_takes_is_not_simulated_unasked() -> None:
    asked = Says(lambda kind: INT8)
    q, x = made("depthwise", wanted="auto", chooser=asked), data("conv")
    assert q.execution == DENSE and torch.equal(q(x), made("depthwise", wanted="float")(x))
    assert made("depthwise").execution == "simulated" and not asked.asked
    assert made("linear", wanted="float", simulate=True).execution == "simulated"


def test_the_scratch_of_a_choice_is_dropped() -> None:
    """A chooser that runs both ways leaves only what was chosen."""

    class Runs(Says):
        def __call__(self, kind: Hashable, runs: Any) -> str:
            gap = (runs["int8_linear"]() - runs[DENSE]()).norm()
            assert 0 < float(gap) < 1
            return super().__call__(kind, runs)

    for answer, dtypes in ((INT8, {torch.int8, torch.float32, torch.int32}), (DENSE, None)):
        q = made(wanted="auto", chooser=Runs(lambda kind, answer=answer: answer))
        q(data("linear"))
        kept = {t.dtype for t in q.packed_tensors()}
        assert kept == (dtypes or {torch.float32})
        assert bool(q.qdata.numel()) == (answer == DENSE)
        state = q.state_dict()["qdata"]
        assert torch.equal(state, made().qdata)


def test_nothing_is_timed_while_a_graph_is_made() -> None:
    from torch._dynamo import reset

    reset()
    asked = Says(lambda kind: DENSE)
    q, x = made(wanted="auto", chooser=asked, scheme=schemes.W8A8), data("linear")
    q(x)
    expected = q(x)
    compiled = torch.compile(q, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected) and len(asked.asked) == 1
    reset()


# --- a whole model --------------------------------------------------------------------------------


def ways() -> dict[str, dict[str, Any]]:
    """Options of attach."""
    by_rows = Says(lambda kind: (INT8, DENSE)[hash(kind[1]) % 2])  # by shape
    return {
        "int8": {"execution": "int8"},
        "float": {"execution": "float"},
        "auto, some": {"chooser": by_rows},
        "auto, none": {"chooser": Says(lambda kind: DENSE)},
    }


@pytest.mark.parametrize("way", ways())
def test_off_is_off_and_a_copy_is_the_same(
    tiny: Any, kind: str, rounded: Any, loop: Any, bits: Any, way: str
) -> None:
    model, sample = tiny(kind), loop(kind)
    before, options = bits(model), ways()[way]
    with torch.no_grad(), attach(model, rounded(kind), **options):
        found = sample(model, 3, 2)
        assert torch.equal(sample(model, 3, 2), found)
        twin = copy.deepcopy(model)
        assert torch.equal(sample(twin, 3, 2), found)
        assert torch.isfinite(sample(model, 3, 1)).all()
    assert bits(model) == before
    with torch.no_grad():
        assert torch.equal(sample(twin, 3, 2), found)


@pytest.mark.parametrize("way", ways())
def test_batched_equals_split(tiny: Any, kind: str, rounded: Any, loop: Any, way: str) -> None:
    """Where a layer's choice does not depend on the number of rows."""
    model = tiny(kind)
    with torch.no_grad(), attach(model, rounded(kind), **ways()[way]):
        together, apart = loop(kind)(model, 1, 2), loop(kind, split=True)(model, 1, 2)
    assert float((apart - together).norm() / together.norm()) < 5e-3


def test_float_is_nearer_than_int8_and_is_told(
    tiny: Any, kind: str, rounded: Any, loop: Any
) -> None:
    """Its images are those of a model with dequantized weights; no layer counts as int8."""
    model, sample = tiny(kind), loop(kind)
    twin = tiny(kind)
    with torch.no_grad():
        plain = sample(model, 1, 2)
        with attach(model, rounded(kind), execution="int8") as attached:
            low, names = sample(model, 1, 2), set(rounded(kind).header["layers"])
            weights = {n: q.weight for n, q in model.named_modules() if isinstance(q, QLayer)}
            assert attached.int8_weight_share() == 1.0
        with attach(model, rounded(kind), execution="float") as attached:
            found = sample(model, 1, 2)
            expected = {"mode": DENSE, "layers": {DENSE: len(names)}}
            assert attached.execution() == expected and attached.int8_weight_share() == 0.0
            dense_bytes = resident_weight_bytes(model)
        with attach(twin, rounded(kind), execution="float"):
            assert resident_weight_bytes(twin) < dense_bytes, "copies come with the first call"
        for name, layer in layers(twin):
            if name in weights:
                layer.weight = nn.Parameter(weights[name])
        table_free = quantized_copy(model, rounded(kind), execution="float").denoiser
        assert torch.equal(sample(table_free, 1, 2), found)
    assert float((found - plain).norm()) < float((low - plain).norm())


def test_the_report_says_who_chose_what(tiny: Any, rounded: Any, loop: Any) -> None:
    model, asked = tiny("dit"), Says(lambda kind: DENSE if kind[1] == (64, 32) else INT8)
    with torch.no_grad(), attach(model, rounded("dit"), chooser=asked) as attached:
        assert attached.execution()["mode"] == "auto"
        loop("dit")(model, 0, 1)
        report = attached.execution()
        shapes = {n: tuple(q.shape) for n, q in model.named_modules() if isinstance(q, QLayer)}
        assert report["choices"].keys() == shapes.keys()
        for name, found in report["choices"].items():
            assert set(found.values()) == {DENSE if shapes[name] == (64, 32) else INT8}, name
            assert all(int(rows) > 0 for rows in found)
        count = sum(shape == (64, 32) for shape in shapes.values())
        assert report["layers"] == {INT8: len(shapes) - count, DENSE: count}
        assert 0 < attached.int8_weight_share() < 1
    kinds = len(set(asked.asked))
    assert kinds < len(shapes), "layers that are alike share a choice"


def test_layers_of_one_input_choose_together(tiny: Any, rounded: Any, loop: Any) -> None:
    """In compiled blocks, where one quantization and one product serve all of them."""
    model = tiny("dit")
    subsets = [s.linears for s in describe(model).subsets if len(s.linears) > 1]
    shapes = {tuple(model.get_submodule(name).weight.shape for name in names) for names in subsets}
    asked = Says(lambda kind: DENSE if shapes & set(kind) else INT8)
    with torch.no_grad(), attach(model, rounded("dit"), chooser=asked, compile=True) as attached:
        (blocks,) = (p for p in attached.patches if isinstance(p, CompiledBlocks))
        blocks.options = {"backend": "eager"}
        modules: Any = dict(model.named_modules())
        groups = [[modules[name] for name in names] for names in subsets]
        assert groups and all(one.siblings == tuple(group) for group in groups for one in group)
        loop("dit")(model, 0, 1)
        assert all(set(one.choices.values()) == {None} for group in groups for one in group)
        others = [m for m in model.modules() if isinstance(m, QLayer) and not m.siblings]
        assert others and all(None not in m.choices.values() for m in others)
        one = groups[0][0]
        assert sum(bool(shapes & set(kind)) for kind in asked.asked) == len(groups)
    assert not one.siblings


@pytest.mark.parametrize("kernel", [True, False])
def test_what_is_timed_is_all_of_them(kernel: bool) -> None:
    """Each of the layers runs, by the kernel or in float, on one tensor that no memo knows."""
    seen: list[tuple[Any, Any, Tensor]] = []
    made_of = [made(wanted="auto", chooser=Says(lambda kind: INT8)) for _ in range(3)]
    for one in made_of:
        one.siblings = tuple(made_of)
        by = one.by
        one.by = lambda k, x, one=one, by=by: seen.append((one, k, x)) or by(k, x)

    def chooser(kind: Any, runs: Any) -> str:
        name = next(n for n in runs if (n == DENSE) != kernel)
        seen.clear()
        runs[name]()
        return name

    made_of[0].chooser = chooser
    x = data("linear")
    with torch.no_grad():
        made_of[0](x)
    tried, (_, taken, _) = seen[:3], seen[-1]
    assert [one for one, _, _ in tried] == made_of
    assert len({id(x) for _, _, x in tried}) == 1 and tried[0][2] is not x
    assert {k for _, k, _ in tried} == {taken} and (taken is not None) == kernel
    assert all(list(one.choices.values()) == [taken] for one in made_of)


def test_an_unknown_execution_is_refused(tiny: Any, rounded: Any, bits: Any) -> None:
    model = tiny("dit")
    before = bits(model)
    with pytest.raises(TenutoError, match="auto, int8, float"):
        attach(model, rounded("dit"), execution="fp8")
    assert bits(model) == before
