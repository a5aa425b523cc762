"""The router: its gradient, its rules, its budget, what it may not touch, and what it is for."""

import dataclasses
import math

import pytest
import torch

import tenuto as tn
from tenuto.caching import LateInterval, RouterScores, shape_of
from tenuto.caching.random_table import RandomTable
from tenuto.caching.schedule import CacheSchedule
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.calibration.router import iepo
from tenuto.calibration.router.harmonica import HarmoniCa
from tenuto.calibration.router.logits import Router
from tenuto.calibration.router.mixing import mixed, straight_through
from tenuto.calibration.router.rollout import (
    Guide,
    errors,
    evaluate,
    intercepted,
    references,
    step_costs,
)
from tenuto.calibration.router.student import Student
from tenuto.calibration.router.training import Training
from tenuto.model.parts import frozen
from tenuto.model.patches import override_
from tenuto.resume import Work
from tenuto.runtime.layers import QConv2d, QLinear
from tenuto.sampling.clock import Clock

QUICK = HarmoniCa(reuse=0.4, iterations=6, batch=2)


@pytest.fixture
def training(transformer, trajectory, branches):
    return Training(QUICK, transformer, trajectory, branches)


def test_random_logits_with_a_constant_first_row(training):
    assert (training.logits[0] == 5).all()
    rest = training.logits[1:]
    assert abs(float(rest.mean())) < 0.4 and 0.7 < float(rest.std()) < 1.3


@pytest.mark.parametrize("credit", [0, 20])
def test_the_gradient_is_that_of_the_mixture(credit, transformer, trajectory, branches):
    """Against finite differences of the loss in float64, at steps where everything is reused.

    The inputs are recorded ones, so that a step's weights reach a later loss by the slots alone.
    """
    transformer.double().requires_grad_(False)
    start = torch.rand(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def losses(rows):
        found = {}

        def learn(row, loss, slopes):
            found[row] = (loss, slopes)

        guide = _double(Guide(transformer, 2.0, 2))
        student = Student(lambda row: rows[row], learn, guide, credit)
        with (
            torch.no_grad(),
            intercepted(transformer, trajectory.timesteps, call=student.attend) as clock,
            mixed(transformer, branches, clock, 0.1, "mixture") as student.mixer,
        ):
            for call in trajectory.calls[:4]:
                transformer(**{k: _wide(v) for k, v in call.inputs.items()})
        return found

    base = losses(start)
    assert [sorted(base[row][1]) for row in (1, 2, 3)] == (
        [[1], [1, 2], [1, 2, 3]] if credit else [[1], [2], [3]]
    )
    for row in (1, 2, 3):
        for of, slopes in base[row][1].items():
            column = 4 if of == row else 8  # of the last branch no other one's output is made
            up, down = start.clone(), start.clone()
            up[of, column] += 1e-5
            down[of, column] -= 1e-5
            slope = (losses(up)[row][0] - losses(down)[row][0]) / 2e-5
            assert float(slopes[column]) == pytest.approx(slope, rel=1e-4)


def _wide(value):
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


class _double:
    """A guide whose `.float()` keeps 64 bits, so that finite differences can be taken."""

    def __init__(self, guide):
        self.guide = guide

    def __call__(self, *args):
        return _Wide(self.guide(*args))


class _Wide(torch.Tensor):
    @staticmethod
    def __new__(cls, x):
        return x.as_subclass(cls)

    def float(self):
        return self.as_subclass(torch.Tensor)


def test_the_mixture_itself(transformer, trajectory, branches, loop):
    """One branch at r = 0.25 and the rest at 1: its slot holds the mixture, "fresh" holds f."""
    name, calls = branches[2], [c.inputs for c in trajectory.calls]
    outputs = []
    probe = transformer.get_submodule(name)
    for store in ("mixture", "fresh"):
        with (
            torch.no_grad(),
            intercepted(transformer, trajectory.timesteps) as clock,
            mixed(transformer, branches, clock, 0.1, store) as mixer,
        ):
            hook = probe.register_forward_hook(lambda m, a, out: outputs.append(out))
            mixer.set(torch.ones(9))
            transformer(**calls[0])
            mixer.apart = True
            transformer(**calls[1])
            mixer.apart = False
            weights = torch.ones(9)
            weights[2] = 0.25
            mixer.set(weights)
            transformer(**calls[1])
            slot = probe.__dict__["forward"].__self__.call.slot
            kept = slot.find(clock, shape_of((outputs[-1],), {}))
            hook.remove()
        held, fresh, out = outputs[-3:]
        torch.testing.assert_close(out, 0.25 * fresh + 0.75 * held)
        torch.testing.assert_close(kept, out if store == "mixture" else fresh)


def test_a_slot_is_written_only_above_tau(transformer, trajectory, branches):
    calls = [c.inputs for c in trajectory.calls]
    with (
        torch.no_grad(),
        intercepted(transformer, trajectory.timesteps) as clock,
        mixed(transformer, branches, clock, 0.1, "mixture") as mixer,
    ):
        slot = transformer.get_submodule(branches[0]).__dict__["forward"].__self__.call.slot
        mixer.set(torch.ones(9))
        transformer(**calls[0])
        first = slot.last[2]
        mixer.set(torch.full((9,), 0.1))
        transformer(**calls[1])
        assert slot.last[2] is first
        mixer.set(torch.full((9,), 0.11))
        transformer(**calls[2])
        assert slot.last[2] is not first


def test_training_leaves_the_denoiser_and_row_0_alone(transformer, trajectory, branches):
    before = {k: v.clone() for k, v in transformer.state_dict().items()}
    grads = [p.requires_grad for p in transformer.parameters()]
    router = QUICK(transformer, trajectory, branches)
    assert (router.logits[0] == 5).all()
    assert all(torch.equal(v, before[k]) for k, v in transformer.state_dict().items())
    assert [p.requires_grad for p in transformer.parameters()] == grads
    assert all(p.grad is None for p in transformer.parameters())
    assert not any("forward" in m.__dict__ for m in transformer.modules())


def test_the_student_goes_on_with_its_own_output(transformer, trajectory, branches, loop):
    """With every r at 1 the student is the plain model, so the images are the same."""
    training = Training(QUICK, transformer, trajectory, branches)
    training.weights = torch.ones(6)
    student = Student(lambda row: torch.ones(9), lambda *a: None, Guide(transformer, 2.0, 2))
    with (
        frozen(transformer),
        intercepted(transformer, trajectory.timesteps, call=student.attend) as clock,
        mixed(transformer, branches, clock, 0.1, "mixture") as student.mixer,
    ):
        found = loop()(transformer, 3, 2)
    torch.testing.assert_close(found, loop()(transformer, 3, 2))


PAPER = {"lr": 0.5, "joint": 0.0, "credit": 0, "tau": 0.1}


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"weighting": "paper"} | PAPER,
        {"weighting": "code"} | PAPER,
        {"weighting": "none"} | PAPER,
        {"credit": 2, "store": "fresh"},
    ],
    ids=str,
)
def test_beats_random_tables(variant, transformer, trajectory, branches):
    settings = dataclasses.replace(QUICK, **{"iterations": 10} | variant)
    table = settings(transformer, trajectory, branches).cut(0.4)
    tables = {f"random {s}": RandomTable(0.4, s)(trajectory.timesteps, branches) for s in range(6)}
    found = evaluate(transformer, tables | {"router": table}, trajectory, [1000], 2)
    mine = found.pop("router")
    assert table.reuse_ratio == pytest.approx(tables["random 0"].reuse_ratio)
    assert mine < sum(found.values()) / len(found)


def test_resumes_to_the_same_bytes(tmp_path, transformer, trajectory, branches):
    whole = QUICK(transformer, trajectory, branches)

    class Stop(tn.Cancelled):
        pass

    def stop(done, total, note):
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        QUICK(transformer, trajectory, branches, work=Work(tmp_path / "w", {}), on_progress=stop)
    assert not any("forward" in m.__dict__ for m in transformer.modules())
    seen = []
    again = QUICK(
        transformer, trajectory, branches,
        work=Work(tmp_path / "w", {}), on_progress=lambda done, total, note: seen.append(done),
    )  # fmt: skip
    assert seen == [4, 5, 6]
    assert torch.equal(again.logits, whole.logits) and again.history == whole.history


def test_works_where_guidance_comes_in_two_calls(transformer, branches, loop):
    trajectory = tn.record(transformer, sample=loop(split=True), batch=2, runs=1, guidance=2.0)
    router = QUICK(transformer, trajectory, branches)
    assert router.cut(0.4).reuse_ratio == pytest.approx(0.4, abs=0.02)


def test_works_where_the_loop_is_in_inference_mode(transformer, branches, loop):
    sample = torch.inference_mode()(loop())
    trajectory = tn.record(transformer, sample=sample, batch=2, runs=1, guidance=2.0)
    plain = tn.record(transformer, sample=loop(), batch=2, runs=1, guidance=2.0)
    settings = dataclasses.replace(QUICK, iterations=2)
    found = [settings(transformer, t, branches).logits for t in (trajectory, plain)]
    torch.testing.assert_close(*found)


def test_quantized_layers_let_the_gradient_through(transformer, trajectory, branches):
    artifact = tn.quantize(transformer, tn.schemes.W8A8, trajectory)
    denoiser = tn.runtime.quantized(transformer, artifact, route=False).denoiser
    settings = dataclasses.replace(QUICK, iterations=2)
    seen = settings(denoiser, trajectory, branches).logits
    like = settings(transformer, trajectory, branches).logits
    moved = (seen[1:] - Training(settings, denoiser, trajectory, branches).logits[1:]).abs()
    assert float((moved > 0.1).float().mean()) > 0.9
    assert float(((seen > 0) == (like > 0)).float().mean()) > 0.7


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_gradient_of_a_quantized_layer_is_that_of_its_weight(kind):
    torch.manual_seed(0)
    plain = torch.nn.Linear(16, 24) if kind == "linear" else torch.nn.Conv2d(16, 24, 3, 2, 1)
    shape = (2, 5, 16) if kind == "linear" else (2, 16, 9, 9)
    weight = RoundToNearest().weight(plain.weight, tn.schemes.W8A8.weight)
    kinds = {"linear": QLinear, "conv": QConv2d}
    layer = kinds[kind](plain, weight, tn.schemes.W8A8, Clock([0.0]))
    patch = override_(layer, straight_through)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    (slope,) = torch.autograd.grad(out.square().sum(), x)
    patch.remove()
    with torch.no_grad():
        assert torch.equal(out, layer(x))
    plain.weight.data.copy_(layer.weight)
    (expected,) = torch.autograd.grad(plain(x), x, grad_outputs=2 * out.detach())
    torch.testing.assert_close(slope, expected)


# lambda


def linear(gains):
    """A sampler whose final latent moves by gains[t] (1 - r[t]) in a direction of its own."""

    def run(weights):
        return (1 - weights[:, 0]).double() * torch.tensor(gains, dtype=torch.float64)

    return run


def test_lambda_by_the_paper_and_by_the_code():
    r = torch.tensor([[1.0], [0.5], [0.2]])
    run = linear([0.0, 2.0, 3.0])
    expected = torch.tensor([0.0, 1.0, 2.4**2], dtype=torch.float64)
    torch.testing.assert_close(iepo.paper(run, r), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(iepo.code(run, r), expected / 3, rtol=1e-6, atol=1e-9)


def test_the_rules_differ_where_steps_act_on_each_other():
    """x_0 = (what step 1 left) * (what step 2 left): the code's rule sees step 2 after step 1."""
    r = torch.tensor([[1.0], [0.5], [0.5]])
    seen = {n: rule(lambda w: w[1] * w[2], r) for n, rule in iepo.RULES.items()}
    assert seen["paper"].tolist() == pytest.approx([0, 0.0625, 0.0625])
    assert seen["code"].tolist() == pytest.approx([0, 0.25, 0.0625])


def test_gain_is_the_growth_of_a_squared_error():
    found = iepo.gain(torch.tensor([0.0, 8.0, 1.0]), torch.tensor([0.0, 2.0, 0.0]))
    assert found.tolist() == [0, 4, 0]


def test_lambda_is_measured_anew_every_c_steps(transformer, trajectory, branches, monkeypatch):
    seen = []
    rule = iepo.RULES["code"]
    monkeypatch.setitem(iepo.RULES, "code", lambda run, r: seen.append(1) or rule(run, r))
    settings = dataclasses.replace(QUICK, iterations=5, weighting="code", refresh=12)
    settings(transformer, trajectory, branches)
    assert len(seen) == 3  # trajectories 0, 2 and 4 of 6 steps


# budget


def test_the_cut_holds_what_was_asked():
    logits = torch.randn(20, 36, generator=torch.Generator().manual_seed(0))
    logits[0] = 5
    times, names = tuple(range(20, 0, -1)), tuple(f"b{i}" for i in range(36))
    plain = Router(logits, times, names, torch.ones(36), 1.0)
    for reuse in (0.3, 0.5, 0.95):
        assert plain.cut(reuse).reuse_ratio == pytest.approx(reuse)
    assert plain.cut(0).reuse_ratio == 0
    held = ~plain.cut(0.3).table
    assert logits[held].max() < logits[~held].min()
    costs = torch.arange(36) % 3 * 0.5 + 0.5
    priced = Router(logits, times, names, costs, 1.0).cut(0.3)
    share = float((~priced.table * costs).sum() / (20 * costs.sum()))
    assert 0.3 - 1e-6 <= share < 0.303


def test_a_cut_without_spread_takes_whole_steps():
    logits = torch.randn(20, 36, generator=torch.Generator().manual_seed(0))
    logits[0] = 5
    router = Router(logits, tuple(range(20, 0, -1)), tuple("b" * 36), torch.ones(36), 1.0)
    table = router.cut(0.3, spread=1e-4).table
    held = (~table).sum(1)
    assert sorted(held.tolist()) == [0] * 14 + [36] * 6
    assert logits[held > 0].mean(1).max() < logits[held == 0].mean(1).min()


def test_beta_follows_the_budget(transformer, trajectory, branches):
    """Few trajectories bring the share only some of the way; the cut then meets the budget."""
    shares = []
    for reuse in (0.2, 0.6):
        settings = dataclasses.replace(QUICK, reuse=reuse, iterations=10)
        router = settings(transformer, trajectory, branches)
        shares.append(router.history[-1]["reuse"])
        assert router.cut(reuse).reuse_ratio == pytest.approx(reuse, abs=0.02)
    assert shares[0] < 0.25 and shares[1] > 0.45


def test_a_fixed_beta_trades_error_for_reuse(transformer, trajectory, branches):
    shares = []
    for beta in (1e-12, 1e-4):
        settings = dataclasses.replace(QUICK, reuse=None, beta=beta, iterations=6)
        router = settings(transformer, trajectory, branches)
        assert math.isclose(router.beta, beta)
        shares.append(router.threshold(0.1).reuse_ratio)
    assert shares[0] < shares[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"reuse": None},
        {"beta": 1e-7},
        {"weighting": "gumbel"},
        {"store": "both"},
        {"iterations": 0},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(tn.TenutoError):
        HarmoniCa(**wrong)


# rollout


def test_errors_are_zero_at_all_compute(transformer, trajectory, branches):
    full = CacheSchedule.full(trajectory.timesteps, branches)
    reference = references(transformer, trajectory, [50, 52], 2)
    assert reference.shape[0] == 4
    assert errors(transformer, full, trajectory, [50, 52], 2, reference).tolist() == [0] * 4


def test_the_cost_of_one_step_is_what_a_whole_run_shows(transformer, trajectory, branches):
    result, step = step_costs(transformer, trajectory, branches, 7, 2)
    assert result[0] == step[0] == 0 and (step[1:] > 0).all()
    for row in (1, 4):
        computed = [i != row for i in range(6)]
        schedule = CacheSchedule.steps(computed, trajectory.timesteps, branches)
        whole = evaluate(transformer, {"one": schedule}, trajectory, [7], 2)["one"]
        assert float(result[row]) == pytest.approx(whole, rel=1e-3)


def test_the_guide_finds_the_unconditional_half(transformer, trajectory):
    inputs = trajectory.calls[0].inputs
    out = torch.arange(4.0).view(4, 1, 1, 1)
    first = Guide(transformer, 3.0, 2)((out,), (), inputs)
    assert first.flatten().tolist() == [0 + 3 * 2, 1 + 3 * 2]
    prompts = inputs["encoder_hidden_states"]
    swapped = inputs | {"encoder_hidden_states": torch.cat(prompts.chunk(2)[::-1])}
    last = Guide(transformer, 3.0, 2)((out,), (), swapped)
    assert last.flatten().tolist() == [2 - 3 * 2, 3 - 3 * 2]
    assert torch.equal(Guide(transformer, None, 2)((out,), (), inputs), out)
    assert torch.equal(Guide(transformer, 3.0, 4)((out,), (), inputs), out)


def test_of_equal_cells_the_latest_are_reused():
    """Early steps are the sensitive ones, and a heap of equal logits says nothing of them."""
    table = RouterScores(torch.zeros(6, 3), 1 / 3)(tuple(range(6, 0, -1)), ("a", "b", "c")).table
    assert table.tolist() == [[True] * 3] * 4 + [[False] * 3] * 2


def test_a_budget_keeps_the_order_of_what_sank(transformer, trajectory, branches):
    """Cells that are clamped are one heap; with a budget they are ranked, and not clamped."""
    router = dataclasses.replace(QUICK, iterations=30, lr=1.0)(transformer, trajectory, branches)
    free = router.logits[1:].flatten()
    assert float(free.abs().max()) > 5 and len(free.unique()) == len(free)
    fixed = dataclasses.replace(QUICK, reuse=None, beta=1.0, iterations=12, lr=1.0)
    assert float(fixed(transformer, trajectory, branches).logits.abs().max()) == 5


def test_straight_through_runs_what_the_schedule_will(transformer, trajectory, branches):
    """The output in training is that of the hard table; the gradient is the mixture's, f - c."""
    rows = torch.tensor([[1.0] * 9, [0.9, 0.2] * 4 + [0.3]], dtype=torch.float32)
    rows = torch.cat([rows, rows[1:].repeat(4, 1)])
    table = rows > 0.5
    found: list[dict] = []

    def learn(row, loss, slopes):
        found.append(slopes)

    def run(hard):
        guide = Guide(transformer, 2.0, 2)
        student = Student(lambda row: rows[row], learn, guide, hard=hard)
        with (
            intercepted(transformer, trajectory.timesteps, call=student.attend) as clock,
            mixed(transformer, branches, clock, 0.0, "mixture") as student.mixer,
        ):
            return trajectory.rollout()(transformer, 3, 2)

    schedule = CacheSchedule(table, trajectory.timesteps, branches)
    with intercepted(transformer, trajectory.timesteps, schedule):
        wanted = trajectory.rollout()(transformer, 3, 2)
    torch.testing.assert_close(run(True), wanted)
    assert all(bool((slopes[row] != 0).any()) for slopes in found for row in slopes)
    assert not torch.allclose(run(False), wanted, atol=1e-4)


def test_coherent_errors_add_up_before_they_are_squared(transformer, trajectory, branches):
    """The losses of a run add up to the square of the sum of its weighted errors."""
    rows, gains = torch.full((6, 9), 0.4), [0.0, 3.0, 2.0, 2.0, 1.0, 0.5]
    losses, gaps = [], []
    guide = Guide(transformer, 2.0, 2)

    def seen(*given):
        gaps.append(guide(*given))
        return gaps[-1]

    student = Student(
        lambda row: rows[row], lambda r, loss, s: losses.append(loss), seen, gains=gains
    )
    with (
        intercepted(transformer, trajectory.timesteps, call=student.attend) as clock,
        mixed(transformer, branches, clock, 0.0, "mixture") as student.mixer,
    ):
        trajectory.rollout()(transformer, 3, 2)
    pairs = zip(gaps[::2], gaps[1::2], gains[1:], strict=True)
    total = sum(gain * (out - target).detach() for target, out, gain in pairs)
    assert sum(losses) == pytest.approx(float(total.square().mean()), rel=1e-4)


def test_it_starts_at_a_schedule(transformer, trajectory, branches):
    """Without an update the cut is that schedule again."""
    start = LateInterval(3, 3)(trajectory.timesteps, branches)
    training = Training(QUICK, transformer, trajectory, branches)
    training.begin_at(start)
    assert torch.equal(training.logits > 0, start.table)
