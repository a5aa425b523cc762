"""The published policies beside the forecast: each does what its formula says."""

from __future__ import annotations

import copy
import itertools
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

import tenuto as tn
from tenuto.caching import (
    L2P,
    CachedBranch,
    CacheSchedule,
    DeepCache,
    EasyCache,
    Facts,
    FirstBlock,
    ForecastCalls,
    GrowingWindow,
    LearningToCache,
    MagCache,
    Magnitudes,
    RunTimeCalls,
    TaylorSeer,
    apply_policy_,
)
from tenuto.caching.history import taylor
from tenuto.caching.l2p import predictors
from tenuto.calibration.router.learning_to_cache import train_gates
from tenuto.calibration.router.rollout import evaluate, intercepted
from tenuto.errors import ModelError, TenutoError
from tenuto.model import watched
from tenuto.sampling import Clock, Follow
from tests.core import tiny_pipelines as tiny

TIMES = tuple(float(t) for t in range(950, -1, -50))


def under(denoiser: nn.Module, policy: Any, times: Any, run: Any) -> tuple[Any, list[Any]]:
    """What `run()` returns with the policy on the denoiser, and what its patches counted."""
    clock = Clock(times)
    patches: list[Any] = [Follow(denoiser, clock)]
    try:
        patches += apply_policy_(denoiser, policy, clock)
        found = run()
        kinds = (CachedBranch, ForecastCalls, RunTimeCalls)
        calls = [p.call for p in patches if isinstance(getattr(p, "call", None), kinds)]
        return found, [list(call.counts) for call in calls]
    finally:
        while patches:
            patches.pop().remove()


# --- TaylorSeer -----------------------------------------------------------------------------------


def test_the_series_of_taylorseer() -> None:
    assert taylor([5.0], 9.0) == [1.0]
    assert taylor([7.0, 4.0], 13.0) == pytest.approx([3.0, -2.0])  # a line, 6 steps on by gaps of 3
    f0, f1, f2, ahead = 5.0, 3.0, 2.0, 2.0  # computed at 10, 8, 4
    first, before = (f0 - f1) / 2, (f1 - f2) / 4
    wanted = f0 + ahead * first + ahead**2 / 2 * (first - before) / 2
    found = taylor([10.0, 8.0, 4.0], 12.0)
    assert sum(w * f for w, f in zip(found, (f0, f1, f2), strict=True)) == pytest.approx(wanted)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_held_branch_is_extrapolated(order: int) -> None:
    """Of outputs that are a line in the timestep it is exact, and the last one is not."""
    clock = Clock((9.0, 8.0, 7.0, 6.0, 5.0))
    cell = CachedBranch(clock, [True, True, True, False, False], order=order)
    module, found = nn.Identity(), []
    for time in clock.timesteps:
        clock.tick(time, ("a", "b"))
        out = torch.tensor([[2 * time + 1], [3 - time]])
        found.append((cell(lambda x, out=out: out, module, torch.zeros(2, 3)), out))
    assert cell.counts == [3, 2]
    for got, true in found[3:]:
        assert torch.allclose(got, true) == (order > 0)
    if not order:
        assert torch.equal(found[4][0], found[2][1])


def test_halves_of_guidance_are_extrapolated_apart(
    transformer: Any, trajectory: Any, branches: Any, loop: Any
) -> None:
    """In one call or in two: the same streams, the same series."""
    policy = TaylorSeer(2, 2, 2)(trajectory.timesteps, branches)
    assert policy.order == 2
    with intercepted(transformer, trajectory.timesteps, policy):
        one = loop()(transformer, 3, 2)
        two = loop(split=True)(transformer, 3, 2)
    plain = CacheSchedule(policy.table, policy.timesteps, policy.branches)
    with intercepted(transformer, trajectory.timesteps, plain):
        held = loop()(transformer, 3, 2)
    assert torch.allclose(one, two, atol=1e-5) and not torch.allclose(one, held, atol=1e-3)


def test_the_order_stays_with_a_schedule() -> None:
    made = TaylorSeer(2, 4, 1)(TIMES, ("a", "b"))
    assert made.at(TIMES[::2]).order == made.over(("b", "a", "c")).order == 1
    assert made.at(tuple(t + 0.1 for t in TIMES)).order == 1
    with pytest.raises(TenutoError, match="order"):
        CacheSchedule(made.table, TIMES, ("a", "b"), order=9)


# --- tables ---------------------------------------------------------------------------------------


def test_the_windows_grow() -> None:
    computed = GrowingWindow(3, 1.0, 0.5)(TIMES, ("a",)).table[:, 0].tolist()
    assert [i for i, c in enumerate(computed) if c] == [0, 1, 2, 4, 6, 9, 12, 16]


def test_gates_are_of_every_other_step() -> None:
    gates = torch.full((20, 3), -1.0)
    gates[5, 1] = 2.0
    table = LearningToCache(gates, theta=0.5)(TIMES, tuple("abc")).table
    assert bool(table[::2].all()) and table[1::2].sum() == 1 and bool(table[5, 1])
    at_share = LearningToCache(gates, reuse=0.25)(TIMES, tuple("abc"))
    assert at_share.reuse_ratio == pytest.approx(0.25) and bool(at_share.table[5, 1])
    with pytest.raises(TenutoError, match="at most 50%"):
        LearningToCache(gates, reuse=0.6)(TIMES, tuple("abc"))
    assert LearningToCache.for_share(0.6, Facts(TIMES, tuple("abc"), None, gates)) == []


def test_gates_learn_which_branches_matter(
    transformer: Any, trajectory: Any, branches: Any
) -> None:
    """Their table is nearer than the one that holds what they would compute."""
    gates = train_gates(transformer, trajectory, branches, 0.25)
    assert bool((gates[::2] == 5).all())
    times = trajectory.timesteps
    tables = {
        name: LearningToCache(kept, reuse=0.25)(times, branches)
        for name, kept in (("trained", gates), ("reversed", -gates))
    }
    error = evaluate(transformer, tables, trajectory, [70, 80], 2)
    assert error["trained"] < 0.7 * error["reversed"]


def test_deep_cache_computes_the_outermost_layers() -> None:
    pipe, prompts, call = tiny.asked("sd")
    unet = pipe.unet
    held = DeepCache().branches_of(unet)
    ran: list[str] = []
    trajectory = tn.record(pipe, prompts, steps=9, call=call, guidance=2.0, batch=1, runs=1)
    last = f"up_blocks.{len(unet.up_blocks) - 1}.resnets.{len(unet.up_blocks[-1].resnets) - 1}"
    names = ("conv_in", "conv_out", "mid_block.resnets.0.conv1", f"{last}.conv1")
    with torch.no_grad(), ExitStack() as watching:
        for name in names:
            module = unet.get_submodule(name)
            seen = watched(module, before=lambda *_, name=name: ran.append(name))
            watching.enter_context(seen)
        run = trajectory.rollout()
        _, counts = under(unet, DeepCache(1, 9), trajectory.timesteps, lambda: run(unet, 0, 1))
    (first, skipped) = counts[0]
    assert counts == [[first, skipped]] * len(held) and first <= 2 and first + skipped == 9
    assert [ran.count(name) for name in names] == [9, 9, first, 9]  # the deep one is held
    with pytest.raises(ModelError, match="U-Nets"):
        DeepCache().branches_of(nn.Linear(2, 2))


# --- at run time ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [FirstBlock(0.0), MagCache((0.5, 0.9), 0.0), EasyCache(0.0, first=1)],
    ids=lambda p: p.name,
)
def test_without_a_threshold_nothing_is_skipped(
    policy: Any, transformer: Any, trajectory: Any, loop: Any
) -> None:
    plain = loop()(transformer, 3, 2)
    found, counts = under(
        transformer, policy, trajectory.timesteps, lambda: loop()(transformer, 3, 2)
    )
    assert counts[0] == [6, 0] and torch.allclose(found, plain, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "computed"),
    [
        (FirstBlock(1e9), 1),
        (FirstBlock(1e9, first=3), 3),
        (MagCache((1.0, 1.0), 1.0, longest=99, retained=0.5), 3),
        (MagCache((1.0, 1.0), 1.0, longest=2, retained=0.5), 4),
        (EasyCache(1e9, first=2, last=False), 2),
        (EasyCache(1e9, first=2), 3),
    ],
    ids=str,
)
def test_with_a_high_one_all_is(
    policy: Any, computed: int, transformer: Any, trajectory: Any, loop: Any
) -> None:
    """In both runs alike, in one call of both halves or in two; the model is left as it was."""

    def both() -> tuple[Any, Any]:
        return loop()(transformer, 3, 2), loop()(transformer, 3, 2)

    plain = loop()(transformer, 3, 2)
    (one, two), counts = under(transformer, policy, trajectory.timesteps, both)
    assert counts[0] == [2 * computed, 2 * (6 - computed)]
    assert torch.equal(one, two) and not torch.equal(one, plain)
    split, counts = under(
        transformer, policy, trajectory.timesteps, lambda: loop(split=True)(transformer, 3, 2)
    )
    assert counts[0] == [2 * computed, 2 * (6 - computed)]
    assert torch.allclose(split, one, atol=1e-5)
    assert torch.equal(loop()(transformer, 3, 2), plain)


def test_the_blocks_add_what_they_added(transformer: Any, trajectory: Any, loop: Any) -> None:
    """A skipped call of first-block caching: the first block's own output, then what was added."""
    seen: dict[str, list[Any]] = {}
    first, last = transformer.transformer_blocks[0], transformer.transformer_blocks[-1]
    head = transformer.norm_out
    with (
        watched(first, after=lambda n, a, k, out: seen.setdefault("first", []).append(out.clone())),
        watched(last, after=lambda n, a, k, out: seen.setdefault("last", []).append(out.clone())),
        watched(head, before=lambda n, a, k: seen.setdefault("head", []).append(a[0].clone())),
    ):
        under(transformer, FirstBlock(1e9), trajectory.timesteps, lambda: loop()(transformer, 3, 2))
    added = seen["head"][0] - seen["first"][0]
    for step in (1, 5):
        assert torch.allclose(seen["head"][step], seen["first"][step] + added, atol=1e-5)


def test_magnitudes_are_measured(transformer: Any, trajectory: Any, loop: Any) -> None:
    """|what the blocks add| over that of the step before, the mean over tokens."""
    inputs, outputs = [], []
    first, last = transformer.transformer_blocks[0], transformer.transformer_blocks[-1]
    with (
        watched(first, before=lambda n, a, k: inputs.append(a[0].clone())),
        watched(last, after=lambda n, a, k, out: outputs.append(out.clone())),
    ):
        loop()(transformer, 3, 2)
    sizes = [(b - a).norm(dim=-1) for a, b in zip(inputs, outputs, strict=True)]
    wanted = [float((b / a).mean()) for a, b in itertools.pairwise(sizes)]
    meter = Magnitudes({})
    under(transformer, meter, trajectory.timesteps, lambda: loop()(transformer, 3, 2))
    assert meter.ratios() == pytest.approx((1.0, *wanted), rel=1e-4)


def test_what_magcache_skips() -> None:
    """error grows by |1 - the product so far|; over the threshold it computes and begins anew."""
    gate, nothing = MagCache((1.0, 0.9, 0.9, 0.9, 0.9), 0.3, 9, retained=0.0).gate(), torch.zeros(1)
    # errors: .1, then .1 + .19 = .29, then + .271: computed; and again from .1
    assert [gate.skips(nothing, i, 5) for i in (1, 2, 3, 4)] == [True, True, False, True]


def test_what_easycache_skips() -> None:
    """The output moves twice as far as the sample: .2 a step of a mean of 10, under .05."""
    gate = EasyCache(0.05, first=2, last=False, residual=False).gate()
    sample, output = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 10.0)
    gate.computed(sample, output)
    found = []
    for step in range(1, 8):
        sample = sample + 0.1
        found.append(gate.skips(sample, step, 20))
        if not found[-1]:
            gate.computed(sample, output + 0.2 if step == 1 else output)
    # step 1 is forced and tells the rate; .0196 a step: two are skipped, the third is over .05
    assert found[:4] == [False, True, True, False]


def test_a_unet_is_broken_off_after_its_first_block() -> None:
    pipe, prompts, call = tiny.asked("sd")
    trajectory = tn.record(pipe, prompts, steps=9, call=call, guidance=2.0, batch=1, runs=1)
    run, unet = trajectory.rollout(), pipe.unet
    ran: list[str] = []
    with (
        watched(unet.conv_in, before=lambda *a: ran.append("in")),
        watched(unet.conv_out, before=lambda *a: ran.append("out")),
        torch.no_grad(),
    ):
        _, counts = under(unet, FirstBlock(1e9), trajectory.timesteps, lambda: run(unet, 0, 1))
    assert counts[0] == [1, 8] and ran.count("in") == 9 and ran.count("out") == 1
    clone = copy.deepcopy(unet)
    assert "forward" not in clone.__dict__ and "forward" not in unet.__dict__


# --- L2P ------------------------------------------------------------------------------------------


def test_rows_of_l2p_predict_what_the_past_spans() -> None:
    """Outputs of two dimensions: two computed steps tell all; a predicted one takes part."""
    outputs = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    computed = [True, True, *[False] * 10]
    taps, weights = predictors(outputs @ outputs.T, computed, 1e-12)
    for step in range(2, 12):
        assert taps[step] == (1, 0)
        found = torch.tensor(weights[step], dtype=torch.float64) @ outputs[list(taps[step])]
        assert torch.allclose(found, outputs[step], atol=1e-4)
    with pytest.raises(TenutoError, match="first"):
        predictors(outputs @ outputs.T, [False] * 12, 0.1)


def test_l2p_on_a_pipeline() -> None:
    pipe, prompts, call = tiny.asked("sd")
    trajectory = tn.record(pipe, prompts, steps=9, call=call, guidance=2.0, batch=1, runs=1)
    facts = Facts(trajectory.timesteps, ())
    found = L2P.at_share(4 / 9, facts, trajectory.kernel)
    run, unet = trajectory.rollout(), pipe.unet
    with torch.no_grad():
        _, counts = under(unet, found[0], trajectory.timesteps, lambda: run(unet, 0, 1))
    assert counts == [[5, 4]]
