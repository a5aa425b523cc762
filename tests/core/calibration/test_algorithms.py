"""Every algorithm passes the same tests: better than rounding to nearest, the same each time."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import json
import pkgutil
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import describe
from tenuto.calibration import algorithms
from tenuto.calibration.algorithms import algorithm
from tenuto.calibration.algorithms.adaround import AdaRound, Rounding
from tenuto.calibration.algorithms.clip import Clip
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.calibration.algorithms.omniquant import Learnt, OmniQuant
from tenuto.calibration.algorithms.stages import Stages
from tenuto.calibration.bank import Bank, Rows
from tenuto.calibration.columns import Even
from tenuto.calibration.compensation import (
    Factor,
    compensated,
    descended,
    gram_of,
    mirrored,
    slope_of,
)
from tenuto.calibration.lengths import Lengths
from tenuto.calibration.moments import inputs_seen, patches
from tenuto.calibration.replay import inputs_of, outputs
from tenuto.errors import Cancelled, SchemeError
from tenuto.model.backbone import layers
from tenuto.model.parts import frozen
from tenuto.numerics.grid import Grid
from tenuto.numerics.qtensor import QTensor, layout
from tenuto.numerics.scheme import Format, Recipe, Rule, Scheme, schemes

W2 = Scheme("w2a16", Format(2, symmetric=False, ranges="mse"))
QUICK = {"iterations": 60, "batch": 16}


def found_classes() -> Iterator[type]:
    """Every algorithm there is: frozen dataclasses that say whether they need inputs."""
    for info in pkgutil.iter_modules(algorithms.__path__):
        module = importlib.import_module(f"{algorithms.__name__}.{info.name}")
        for value in vars(module).values():
            if not isinstance(value, type) or value.__module__ != module.__name__:
                continue
            if hasattr(value, "needs_inputs"):
                yield value


ALGORITHMS = list(found_classes())


def quick(cls: type) -> Any:
    """The algorithm with few iterations, where it has such a setting."""
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in QUICK.items() if k in known})


class Case:
    """A block of a tiny model with what it was recorded to get and to answer."""

    def __init__(self, denoiser: nn.Module, calls: Any, name: str) -> None:
        self.block: Any = denoiser.get_submodule(name)
        self.bank: Bank = inputs_of(denoiser, name, calls, "cpu")
        self.target: Tensor = outputs(self.block, self.bank, "cpu")

    def run(self, method: Any, scheme: Scheme, **options: Any) -> dict[str, QTensor]:
        """`method` on every layer of the block."""
        names = {name: scheme for name, _ in layers(self.block)}
        with frozen(self.block):
            return method(self.block, names, self.bank, self.target, **options)

    def error(self, weights: dict[str, QTensor]) -> float:
        """Mean squared error of the block's outputs with these weights."""
        before = {n: self.block.get_submodule(n).weight.detach().clone() for n in weights}
        with torch.no_grad():
            for name, q in weights.items():
                self.block.get_submodule(name).weight.copy_(q.dequantize())
            found = outputs(self.block, self.bank, "cpu")
            for name, weight in before.items():
                self.block.get_submodule(name).weight.copy_(weight)
        return float((found - self.target).square().mean())


@pytest.fixture(scope="module", params=["pixart", "unet", "home"])
def case(request: pytest.FixtureRequest, tiny: Any, recorded: Any) -> Case:
    """A transformer block, a residual block with convolutions, a block of no family."""
    denoiser = tiny(request.param)
    return Case(denoiser, recorded(request.param).calls, describe(denoiser).blocks[0])


def test_there_are_some() -> None:
    assert {"RoundToNearest", "AdaRound", "GPTQ"} <= {cls.__name__ for cls in ALGORITHMS}
    files = {m.name for m in pkgutil.iter_modules(algorithms.__path__)}
    assert len(files) == len({cls.__module__ for cls in ALGORITHMS}), "one file, one algorithm"


@pytest.mark.parametrize("cls", ALGORITHMS)
@pytest.mark.parametrize("scheme", [schemes.W4A8, W2], ids=lambda s: s.name)
def test_not_worse_than_round_to_nearest(cls: type, scheme: Scheme, case: Case) -> None:
    """On the error of the block, on the inputs that it was given."""
    found = case.run(quick(cls), scheme)
    assert found.keys() == {name for name, _ in layers(case.block)}
    error, nearest = case.error(found), case.error(case.run(RoundToNearest(), scheme))
    assert nearest > 0
    assert error <= nearest * (0.8 if cls in (AdaRound, GPTQ) and scheme is W2 else 1.0)


@pytest.mark.parametrize("cls", ALGORITHMS)
@pytest.mark.parametrize("scheme", [schemes.W8A8, schemes.W4A8], ids=lambda s: s.name)
def test_the_weights_are_of_the_scheme(cls: type, scheme: Scheme, case: Case) -> None:
    """On the ranges that the format finds, or on its own where it searches them."""
    form = scheme.weight
    searched = cls is Stages or getattr(cls, "stage", None) == "clip"
    for name, q in case.run(quick(cls), scheme).items():
        weight = case.block.get_submodule(name).weight
        assert q.shape == tuple(weight.shape) and q.bits == form.bits
        stored = q.tensors(name)
        assert layout(name, q.shape, form) == {
            key: (t.dtype, tuple(t.shape)) for key, t in stored.items()
        }
        grid, usual = q.grid(form), Grid.of(weight, form)
        if not searched:
            torch.testing.assert_close((grid.scale, grid.zero), (usual.scale, usual.zero))
        columns = weight[0].numel()
        size = grid.size(columns).view(weight.shape)
        bottom, top = (t.view(weight.shape) for t in grid.limits(columns))
        assert (q.levels() >= bottom).all() and (q.levels() <= top).all()
        inside = (weight / size > bottom) & (weight / size < top)
        gap = ((q.dequantize() - weight).abs() / size)[inside]
        farther = cls in (GPTQ, Stages)  # it makes up for the errors of other columns
        assert torch.equal(QTensor.of(q.levels().float(), grid).dequantize(), q.dequantize())
        assert farther or gap.max() < 1.001, "a code above or below, never farther"


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_deterministic(cls: type, case: Case) -> None:
    """The same seed, the same codes; nothing else may draw from it."""
    torch.manual_seed(1)
    one = case.run(quick(cls), schemes.W4A8, seed=3)
    torch.manual_seed(2)
    other = case.run(quick(cls), schemes.W4A8, seed=3)
    for name, q in one.items():
        assert torch.equal(q.qdata, other[name].qdata)
        assert torch.equal(q.scale, other[name].scale)


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_the_random_state_is_the_callers(cls: type, case: Case) -> None:
    before = torch.random.get_rng_state()
    case.run(quick(cls), schemes.W4A8)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_the_block_comes_back(cls: type, case: Case, bits: Any) -> None:
    before = bits(case.block)
    case.run(quick(cls), schemes.W4A8)
    assert bits(case.block) == before

    def stop(done: int, total: int, note: str) -> None:
        if done >= 2:
            raise Cancelled

    if cls.needs_inputs:  # type: ignore[attr-defined]
        with pytest.raises(Cancelled):
            case.run(quick(cls), schemes.W4A8, on_progress=stop)
        assert bits(case.block) == before


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_it_survives_a_recipe_in_json(cls: type) -> None:
    recipe = Recipe((Rule("*", schemes.W4A8, quick(cls)),))
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())), algorithm)
    assert again == recipe and type(again.rules[0].algorithm) is cls


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_it_is_frozen_data(cls: type) -> None:
    assert hash(quick(cls)) == hash(quick(cls)) and quick(cls) == quick(cls)
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_an_unknown_one_is_said() -> None:
    for data in ({"name": "Magic"}, {}, {"name": "AdaRound", "speed": 3}, {"name": "Rounding"}):
        with pytest.raises(SchemeError):
            algorithm(data)


# --- round to nearest -----------------------------------------------------------------------------


def test_nearest_is_nearest() -> None:
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    for form in (schemes.W8A8.weight, schemes.W4A8.weight):
        q, grid = RoundToNearest().weight(w, form), Grid.of(w, form)
        error, (bottom, top) = (q.dequantize() - w).abs(), grid.limits(40)
        for step in (-1, 1):
            moved = q.dequantize() + step * grid.size(40)
            reachable = (q.levels() + step >= bottom) & (q.levels() + step <= top)
            assert (error <= (moved - w).abs() + 1e-6)[reachable].all()


# --- AdaRound -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [schemes.W4A8.weight, Format(4), Format(8)])
@pytest.mark.parametrize("shape", [(6, 20), (5, 3, 3, 3)])
def test_rounding_starts_at_the_weight(form: Format, shape: tuple[int, ...]) -> None:
    """The soft weight is the float one where it is not clipped, the hard one the nearest."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rounding = Rounding(w, form)
    rounding.soften()
    soft = rounding.soft.detach()
    step = rounding.size
    inside = (w / step).sub((rounding.low + rounding.high) / 2).abs()
    inside = inside < (rounding.high - rounding.low) / 2 - 1
    assert ((soft - w).abs() / step)[inside].max() < 0.02
    nearest = RoundToNearest().weight(w, form)
    share = (rounding.qtensor().codes() == nearest.codes()).float().mean()
    assert share > 0.995, "all but ties"


def test_gradients_reach_every_rounding_and_nothing_else(case: Case) -> None:
    """Where the rounding is soft the gradient is that of the formula, by differences."""
    method = AdaRound(iterations=1, batch=8, warmup=1.0)
    name, layer = next(iter(layers(case.block)))
    rounding = Rounding(layer.weight, W2.weight)
    args, kwargs = case.bank.rows(torch.arange(4), "cpu")

    def loss(alpha: Tensor) -> Tensor:
        up = (torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1)
        weight = (rounding.floor + up).clamp(rounding.low, rounding.high) * rounding.size
        new = {f"{name}.weight": weight}
        out = torch.func.functional_call(case.block, new, args, kwargs)
        out = out if isinstance(out, Tensor) else out[0]
        return (out - case.target[:4]).square().sum(1).mean()

    alpha = rounding.alpha.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(alpha), alpha)
    place = int(gradient.abs().argmax())
    assert float(gradient.view(-1)[place]) != 0
    moved = torch.zeros_like(alpha).view(-1)
    moved[place] = 1e-2
    moved = moved.view_as(alpha)
    with torch.no_grad():
        slope = float(loss(alpha + moved) - loss(alpha - moved)) / 2e-2
    assert slope == pytest.approx(float(gradient.view(-1)[place]), rel=0.05)
    case.run(method, W2)
    assert all(p.grad is None for p in case.block.parameters())


def test_it_learns_under_no_grad(case: Case) -> None:
    """A caller who draws images is in `no_grad`; that must not stop it, nor change it."""
    plain = case.run(quick(AdaRound), W2, seed=1)
    with torch.no_grad():
        again = case.run(quick(AdaRound), W2, seed=1)
    assert all(torch.equal(q.qdata, again[n].qdata) for n, q in plain.items())


def test_the_exponent_falls_after_the_warm_up() -> None:
    method = AdaRound(iterations=100, warmup=0.2)
    found = [method.exponent(step) for step in range(100)]
    assert found[:20] == [None] * 20
    assert found[20] == 20 and found[99] == pytest.approx(2.2, abs=0.1)
    values = [f for f in found if f is not None]
    assert values == sorted(values, reverse=True)


def lone_layer() -> tuple[nn.Module, Bank, Tensor]:
    """A Linear, correlated inputs, its outputs: small enough for hundreds of iterations."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 24, generator=draw))
        x = torch.randn(64, 4, generator=draw) @ torch.randn(4, 24, generator=draw)
        bank = Bank(((Rows(0),), {}), {0: x}, {}, torch.zeros(64, dtype=torch.int64))
        return layer, bank, layer(x)


def test_the_rounding_term_makes_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end nearly every v is 0 or 1, so that hard rounding changes little."""
    undecided: list[float] = []
    original = Rounding.qtensor

    def look(self: Rounding) -> QTensor:
        self.soften()
        v = self.up.detach()
        undecided.append(float(((v > 0.05) & (v < 0.95)).float().mean()))
        return original(self)

    monkeypatch.setattr(Rounding, "qtensor", look)
    layer, bank, target = lone_layer()
    for weight in (0.0, 1.0):
        method = AdaRound(iterations=300, batch=16, lr=0.05, weight=weight)
        method(layer, {"": W2}, bank, target)
    assert undecided[0] > 0.3 and undecided[1] < 0.2


def test_a_lone_layer_is_a_block_too() -> None:
    """Layers outside of all blocks are reconstructed alone; its name inside itself is empty."""
    layer, bank, target = lone_layer()
    errors = []
    for method in (RoundToNearest(), AdaRound(iterations=300, batch=16, lr=0.02)):
        (q,) = method(layer, {"": schemes.W4A16}, bank, target).values()
        found = nn.functional.linear(bank.tensors[0], q.dequantize(), layer.bias)
        errors.append(float((found - target).detach().square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_progress_counts_iterations(case: Case) -> None:
    notes: list[tuple[int, int]] = []
    case.run(AdaRound(iterations=3, batch=4), W2, on_progress=lambda d, t, _: notes.append((d, t)))
    assert notes == [(0, 3), (1, 3), (2, 3)]


# --- GPTQ -----------------------------------------------------------------------------------------


def moments(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs (R, K), a weight (4, K) and A = x^T x in float64."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw)
    x = (torch.randn(rows, columns, generator=draw) @ mix).double()
    return x, torch.randn(4, columns, generator=draw), x.t() @ x


def test_gptq_and_sweeps_lower_the_error_of_the_layer() -> None:
    """Each stage gives at most the error of the one before; in all much less than nearest."""
    x, weight, gram = moments(300, 40)
    size = (weight.abs().amax(1, keepdim=True) / 7).expand_as(weight)
    grid = Even(size, torch.full_like(size, -8), torch.full_like(size, 7))
    root, square = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1).float(), gram.float()
    nearest = (weight / size).round().clamp(-8, 7) * size
    first, left = compensated(weight, root, grid)
    assert torch.allclose(left, (weight - first) @ root, atol=1e-3)
    slope = slope_of(left, root)
    assert torch.allclose(slope, (first - weight) @ square, rtol=1e-3, atol=1e-2)
    found = [nearest, first]
    for _ in range(3):
        found.append(descended(found[-1], (found[-1] - weight) @ square, square, grid))
    found.append(descended(first, slope, square, grid, 3))  # the three at once
    errors = [float((x @ (c - weight).double().t()).square().sum()) for c in found]
    assert all(b <= a * 1.0001 for a, b in pairwise(errors))
    assert errors[1] < errors[0] * 0.75


def test_a_sweep_ends_where_no_single_code_can_do_better() -> None:
    """All codes of three columns, tried one by one."""
    _, weight, gram = moments(50, 3)
    scale = (weight.abs().amax(1, keepdim=True) / 3).expand_as(weight)
    low, high = torch.full_like(scale, -4), torch.full_like(scale, 3)
    values, square = (weight / scale).round().clamp(-4, 3) * scale, gram.float()
    for _ in range(20):
        values = descended(values, (values - weight) @ square, square, Even(scale, low, high))
    codes = (values / scale).round()

    def error(c: Tensor) -> Tensor:
        gap = (c * scale - weight).double()
        return ((gap @ gram) * gap).sum(1)

    best = error(codes)
    for column, value in itertools.product(range(3), range(-4, 4)):
        other = codes.clone()
        other[:, column] = value
        assert (error(other) >= best * 0.999).all()


def test_asymmetric_calibration_aims_at_what_the_layer_gave_before() -> None:
    """With other inputs than before, the outputs come nearer to the old ones."""
    layer = nn.Linear(16, 8)
    draw = torch.Generator().manual_seed(0)
    was = torch.randn(200, 16, generator=draw)
    now = was + 0.3 * torch.randn(200, 16, generator=draw)
    wanted = was @ layer.weight.detach().t()
    form = schemes.W4A8.weight
    gram = (now.t() @ now)[None]
    lost = wanted - now @ layer.weight.detach().t()
    fitted = GPTQ(damping=1e-4).weight(layer.weight, form, gram, (lost.t() @ now)[None])
    plain = GPTQ(damping=1e-4).weight(layer.weight, form, gram)

    def error(q: QTensor) -> float:
        return float((now @ q.dequantize().t() - wanted).square().mean())

    assert error(fitted) < error(plain)


def test_texts_of_several_lengths_are_aimed_at_as_filled_up_ones_are() -> None:
    """What a layer gave in full precision is known of each token, however long its text is."""
    draw = torch.Generator().manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        for layer in block:
            torch.nn.init.normal_(layer.weight, std=0.2, generator=draw)  # type: ignore[arg-type]
    x = torch.randn(40, 6, 32, generator=draw) @ torch.randn(32, 32, generator=draw)
    tokens = torch.tensor([6] * 20 + [5] * 12 + [3] * 8)
    counted = (torch.arange(6) < tokens[:, None]).long()
    steps, rows = torch.zeros(40, dtype=torch.int64), {0: x * counted[..., None]}
    filled = Bank(((Rows(0),), {}), rows, {}, steps, counted)
    cut = dataclasses.replace(filled, lengths=Lengths(tokens, 6, {0: (1,)}))
    schemes_of = {"0": W2, "1": W2}

    def made(method: GPTQ, bank: Bank) -> tuple[dict[str, QTensor], float]:
        found = method(block, schemes_of, bank)
        now = rows[0] @ found["0"].dequantize().mT @ found["1"].dequantize().mT
        return found, float((now - block(rows[0])).square().mean())

    with frozen(block):
        (wanted, error), (found, same) = made(GPTQ(), filled), made(GPTQ(), cut)
        _, symmetric = made(GPTQ(asymmetric=False), filled)
    for name, q in found.items():
        assert (q.codes() == wanted[name].codes()).float().mean() > 0.99
    assert same == pytest.approx(error, rel=0.02)
    assert same < 0.95 * symmetric


def test_what_gptq_makes_of_second_moments() -> None:
    """Its factor, in part fp32, is A's; D R^-T is the solution of X R^T = D."""
    _, _, gram = moments(1500, 1300)
    made, damped = Factor.of(gram.float(), 0.01), gram.clone()
    damped.diagonal().add_(0.01 * gram.diagonal().mean())
    damped = damped[made.order][:, made.order]
    assert torch.equal(made.root, made.root.triu())
    wide = made.root.double()
    assert (wide @ wide.mT - damped).norm() < 1e-5 * damped.norm()
    assert (made.gram - damped).norm() < 1e-5 * damped.norm()
    gap = torch.randn(5, 1300, generator=torch.Generator().manual_seed(1))
    assert (made.solved(gap).double() @ wide.mT - gap).norm() < 1e-3 * gap.norm()


def test_second_moments_in_tiles() -> None:
    """Only the upper tiles are computed, and the whole is made of these."""
    x = torch.randn(2, 30, 1500, generator=torch.Generator().manual_seed(0))
    found = mirrored(gram_of(x[:, 10:], gram_of(x[:, :10])))
    assert torch.allclose(found, x.mT @ x, atol=1e-3)


def test_gptq_of_grouped_convolutions(tiny: Any, recorded: Any) -> None:
    """Every group has moments of its own; compared with unfolded rows by hand."""
    layer = nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=4)
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    rows = patches(layer, x)
    assert rows.shape == (4, 2 * 9, 2 * 9)
    weight = layer.weight.detach().flatten(1).unflatten(0, (4, -1))
    found = (rows @ weight.mT).permute(1, 0, 2).flatten(1)  # (B L, N)
    bias = layer.bias
    assert bias is not None
    expected = (layer(x) - bias[:, None, None]).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_inputs_seen_are_whole(case: Case) -> None:
    """Also of a layer that is called twice in a block, and when a block is left half-way."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.shared(self.shared(self.first(x))))

    block = Twice()
    x = torch.randn(70, 3, 4, generator=torch.Generator().manual_seed(0))
    bank = Bank(((Rows(0),), {}), {0: x}, {}, torch.zeros(70, dtype=torch.int64))
    seen = list(inputs_seen(block, ["shared"], bank, torch.arange(70), "cpu"))
    assert [len(row["shared"]) for row in seen] == [64, 64, 12]
    first = block.first(x).detach()
    torch.testing.assert_close(seen[2]["shared"][:6], first[64:])
    torch.testing.assert_close(seen[2]["shared"][6:], block.shared(first[64:]).detach())
    assert not block.shared._forward_pre_hooks


def test_adaround_goes_on_from_gptq(case: Case) -> None:
    """Without an iteration it gives GPTQ's codes; it leaves the block as it was."""
    before = {n: p.detach().clone() for n, p in case.block.named_parameters()}
    found = case.run(AdaRound(iterations=0, start="gptq"), schemes.W4A8, seed=4)
    for name, value in case.block.named_parameters():
        assert torch.equal(value, before[name])
    block = copy.deepcopy(case.block)
    names = {name: schemes.W4A8 for name, _ in layers(block)}
    for name, q in GPTQ()(block, names, case.bank, case.target, seed=4).items():
        assert torch.equal(q.codes(), found[name].codes())


def test_symmetric_adaround_aims_at_what_the_block_gives_on_these_inputs(case: Case) -> None:
    """Another target changes nothing then: the block's own outputs on the bank are the target."""
    method = dataclasses.replace(quick(AdaRound), asymmetric=False)
    found = case.run(method, W2, seed=1)
    own = outputs(case.block, case.bank, "cpu")
    names = {name: W2 for name, _ in layers(case.block)}
    again = quick(AdaRound)(case.block, names, case.bank, own, seed=1)
    other = method(case.block, names, case.bank, torch.zeros_like(own), seed=1)
    for name, q in found.items():
        assert torch.equal(q.codes(), again[name].codes())
        assert torch.equal(q.codes(), other[name].codes())


class Narrow(nn.Module):
    """A layer whose memory is short: more than `most` rows at once are refused."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.layer, self.most, self.seen = nn.Linear(24, 16), most, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        """The layer, or what a GPU says that is full."""
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return self.layer(x)


def test_short_memory_takes_the_rows_in_parts() -> None:
    """The same rounding, up to how sums are ordered; where not even one row fits, it is told."""
    found = {}
    for most in (16, 3):
        torch.manual_seed(0)
        block, (_, bank, target) = Narrow(most), lone_layer()
        with frozen(block):
            method = AdaRound(iterations=60, batch=16, lr=0.05)
            found[most] = method(block, {"layer": W2}, bank, target)["layer"].codes()
        assert block.seen[:2] == ([16, 16] if most == 16 else [16, 8])
        assert set(block.seen[10:]) == ({16} if most == 16 else {2})
    assert (found[16] == found[3]).float().mean() > 0.98
    with pytest.raises(torch.cuda.OutOfMemoryError), frozen(block):
        block.most = 0
        method(block, {"layer": W2}, bank, target)


# --- clip, and stages -----------------------------------------------------------------------------


def outlying() -> tuple[Tensor, Tensor]:
    """A weight (16, 64) with a large value in every range, on columns that see little; inputs."""
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 64, generator=draw), torch.randn(500, 64, generator=draw)
    weight[:, ::32] *= 6
    x[:, ::32] *= 0.01
    return weight, x


@pytest.mark.parametrize("group", [0, 32])
def test_clip_gives_up_what_no_input_sees(group: int) -> None:
    """The output's error falls much, that of the weight rises; each row's error never rises."""
    weight, x = outlying()
    form = Format(4, symmetric=False, ranges="mse", group=group)
    start = QTensor.nearest(weight, form)
    found = Clip().weight(weight, form, (x.T @ x)[None], start)

    def errors(q: QTensor) -> Tensor:
        return (x @ (q.dequantize() - weight).T).square().sum(0)

    assert errors(found).sum() < 0.65 * errors(start).sum()
    assert (found.dequantize() - weight).norm() > (start.dequantize() - weight).norm()
    if not group:  # with groups the products of different groups are left out
        assert (errors(found) <= errors(start) * 1.001).all()


def test_clip_of_grouped_convolutions_and_short_groups(case: Case) -> None:
    """Each group has inputs of its own; the last range of a row may be shorter."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, padding=1, groups=4)  # 18 columns
    x = torch.randn(6, 8, 6, 6, generator=draw)
    x[:, ::2] *= 0.05
    bank = Bank(((Rows(0),), {}), {0: x}, {}, torch.zeros(6, dtype=torch.int64))
    scheme = Scheme("g8", Format(3, symmetric=False, group=8))
    target, errors = layer(x).detach(), []
    for method in (RoundToNearest(), Clip()):
        (q,) = method(layer, {"": scheme}, bank, target).values()
        twin = copy.deepcopy(layer)
        twin.weight.data.copy_(q.dequantize())
        errors.append(float((twin(x) - target).detach().square().mean()))
    assert errors[1] < 0.95 * errors[0]


def test_a_stage_keeps_what_the_ones_before_found(case: Case) -> None:
    """GPTQ rounds on the ranges that clipping found."""
    clipped = case.run(Clip(), W2, seed=1)
    found = case.run(Stages((Clip(), GPTQ())), W2, seed=1)
    for name, q in found.items():
        torch.testing.assert_close(q.scale, clipped[name].scale)
        torch.testing.assert_close(q.zero_point, clipped[name].zero_point)
    assert case.error(found) < 0.6 * case.error(clipped)


def test_scales_of_columns_go_through_a_chain() -> None:
    """AWQ's scale is kept, and what is rounded is the weight times it, for inputs over it."""
    weight, x = outlying()
    layer = nn.Linear(64, 16)
    with torch.no_grad():
        layer.weight.copy_(weight)
    x[:, 5] *= 50
    bank = Bank(((Rows(0),), {}), {0: x}, {}, torch.zeros(500, dtype=torch.int64))
    scheme = Scheme("smooth", Format(4, symmetric=False, ranges="mse", group=32, smooth=True))
    given = layer, {"": scheme}, bank, layer(x).detach()

    def error(q: QTensor) -> float:
        return float((x @ (q.dequantize() - weight).T).norm())

    with frozen(layer):
        first = algorithms.by_name("awq", "encoder")(*given)[""]
        more = [algorithms.by_name(n, "encoder")(*given)[""] for n in ("awq+clip", "awq+clip+gptq")]
    assert first.channel is not None and first.channel.std() > 0.01
    for q in more:
        assert q.channel is not None
        torch.testing.assert_close(q.channel, first.channel)
    assert error(more[0]) < error(first) and error(more[1]) < error(more[0])


def test_names_make_a_chain() -> None:
    found = algorithms.by_name("awq+clip+gptq", "encoder")
    assert [type(s).__name__ for s in found.stages] == ["AWQ", "Clip", "GPTQ"]
    assert found.name == "awq+clip+gptq" and found.smooth and found.parts == ("encoder",)
    assert algorithms.by_name("awq-gptq", "encoder") == algorithms.by_name("awq+gptq", "encoder")
    rows = algorithms.by_name("clip+gptq", "denoiser", algorithms.Effort(rows=7))
    assert [s.rows for s in rows.stages] == [7, 7] and not rows.needs_target and not rows.smooth
    bad = ("gptq+clip", "clip+clip", "nearest+gptq", "clip+", "+", "clip+magic", "awq+awq")
    for name in bad:
        with pytest.raises(SchemeError):
            algorithms.by_name(name, "encoder")
    with pytest.raises(SchemeError):  # awq is for encoders
        algorithms.by_name("awq+gptq", "denoiser")


# --- omniquant ------------------------------------------------------------------------------------


def test_what_is_learnt_is_what_is_kept(case: Case) -> None:
    """The weight that the loss sees is that of the codes, whatever the format."""
    forms = (Format(4, symmetric=False, group=8), Format(3, symmetric=False), schemes.W8A8.weight)
    for form in (*forms, Format(4, symmetric=False, ranges="mse", group=8, smooth=True)):
        weight = next(layer for _, layer in layers(case.block)).weight
        one = Learnt(weight, form, QTensor.nearest(weight, form))
        with torch.no_grad():
            one.ends += 0.2 * torch.randn(
                one.ends.shape, generator=torch.Generator().manual_seed(0)
            )
            one.soften()
        torch.testing.assert_close(one.soft, one.qtensor().dequantize(), rtol=1e-5, atol=1e-6)


def test_learnt_ranges_are_nearer_than_searched_ones(case: Case) -> None:
    """On the block's output, from ranges that were searched a layer at a time."""
    scheme = Scheme("w3", Format(3, symmetric=False, ranges="mse", group=8))
    clipped = case.run(Clip(), scheme)
    learnt = case.run(OmniQuant(iterations=100), scheme, before=clipped)
    assert case.error(learnt) < 0.95 * case.error(clipped)
    rounded = case.run(Stages((OmniQuant(iterations=10), GPTQ())), scheme, before=learnt)
    again = case.run(OmniQuant(iterations=10), scheme, before=learnt)
    for name, q in rounded.items():
        torch.testing.assert_close(q.scale, again[name].scale, rtol=1e-3, atol=0)  # GPTQ keeps it


def test_ranges_stay_where_nothing_is_gained_or_can_be_learnt(case: Case) -> None:
    clipped = case.run(Clip(), W2)
    for method in (OmniQuant(iterations=0), OmniQuant(iterations=3, lr=5.0)):
        for name, q in case.run(method, W2, before=clipped).items():
            assert q is clipped[name]
    fp8 = case.run(OmniQuant(iterations=3), schemes.FP8)
    for name, q in fp8.items():
        weight = case.block.get_submodule(name).weight
        assert torch.equal(q.qdata, QTensor.nearest(weight, schemes.FP8.weight).qdata)


def test_tokens_that_do_not_count_teach_nothing() -> None:
    """Ranges are the same whatever stands where a text is filled up."""
    draw = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(16, 8), torch.randn(12, 5, 16, generator=draw)
    counted = torch.ones(12, 5, dtype=torch.int64)
    counted[:, 3:] = 0
    found = []
    for size in (1.0, 100.0):
        filled = x.clone()
        filled[:, 3:] *= size
        bank = Bank(((Rows(0),), {}), {0: filled}, {}, torch.zeros(12, dtype=torch.int64), counted)
        with frozen(layer):
            target = layer(filled).detach()
            found.append(OmniQuant(iterations=20)(layer, {"": W2}, bank, target)[""])
    assert torch.equal(found[0].scale, found[1].scale)
    assert torch.equal(found[0].qdata, found[1].qdata)
