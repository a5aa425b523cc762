"""A schedule on a model: first row computes, runs and streams apart, off is off, full is exact."""

import copy

import pytest
import torch

import tenuto as tn
from tenuto.caching import Interval, LateInterval, RandomTable
from tenuto.caching.cells import Slot, apply_schedule_
from tenuto.caching.schedule import CacheSchedule
from tenuto.calibration.router.rollout import intercepted
from tenuto.sampling.clock import Clock
from tenuto.sampling.follow import Follow

ALTERNATE = (True, False, True, False, True, False)


@pytest.fixture
def alternate(trajectory, branches):
    return CacheSchedule.steps(ALTERNATE, trajectory.timesteps, branches)


def test_the_first_row_computes(branches):
    with pytest.raises(tn.TenutoError, match="first step"):
        CacheSchedule.steps((False, True), (2.0, 1.0), branches)
    with pytest.raises(tn.TenutoError, match="does not fit"):
        CacheSchedule(torch.ones(2, 3, dtype=torch.bool), (2.0,), ("a", "b", "c"))
    with pytest.raises(tn.TenutoError, match="boolean"):
        CacheSchedule(torch.ones(1, 1), (2.0,), ("a",))


def test_the_reuse_ratio_counts_cells_of_all_steps(alternate):
    assert alternate.reuse_ratio == pytest.approx(0.5)


TIMES = tuple(999.0 - 50 * step for step in range(20))
TABLES = {
    "late interval": LateInterval(7, 2), "interval": Interval(3), "long": LateInterval(5, 4),
    "cells": RandomTable(0.4), "half": RandomTable(0.5, 1), "most": RandomTable(0.8, 2),
}  # fmt: skip


def longest(table: torch.Tensor) -> int:
    """The most reuses in a row that any branch has."""
    rows = ["".join("01"[c] for c in column) for column in table.t().int().tolist()]
    return max(len(run) for row in rows for run in row.split("1"))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("steps", [9, 10, 12, 15, 19, 21, 25, 30, 50])
def test_another_step_count_gets_a_table_of_its_own(name: str, steps: int) -> None:
    """The nearest row of 20 would reuse 60 % of 10 steps by a table of 30 %, 20 % of 30 steps."""
    schedule = TABLES[name](TIMES, tuple("abcdefgh"))
    times = [999 * (1 - step / steps) for step in range(steps)]
    found = schedule.at(times)
    assert found.reuse_ratio == pytest.approx(schedule.reuse_ratio, abs=0.0501)
    assert longest(found.table) <= longest(schedule.table)
    assert found.timesteps == tuple(times) and bool(found.table[0].all())


@pytest.mark.parametrize("steps", range(1, 9))
def test_a_short_run_reuses_nothing(steps: int) -> None:
    schedule = Interval(2)(TIMES, ("a", "b"))
    times = [999 * (1 - step / steps) for step in range(steps)]
    assert schedule.at(times).reuse_ratio == 0
    assert Interval(2)(times, ("a",)).at(times).reuse_ratio == pytest.approx((steps // 2) / steps)


def test_its_own_steps_stay() -> None:
    """One by one the nearest: hosts round timesteps; and rising ones, as Z-Image has them."""
    for times in (TIMES, tuple(1 - t / 1000 for t in TIMES)):
        schedule = RandomTable(0.5)(times, ("a", "b", "c"))
        near = schedule.at([t * 1.0001 for t in times])
        assert near.table.equal(schedule.table)
        assert schedule.at(times) is schedule
        other = schedule.at([times[0] + (times[-1] - times[0]) * i / 11 for i in range(12)])
        assert other.reuse_ratio == pytest.approx(0.5, abs=0.03)


def test_late_steps_stay_late() -> None:
    """Where nothing was reused nothing is."""
    table = LateInterval(10, 2)(TIMES, ("a",)).at([999 * (1 - i / 40) for i in range(40)]).table
    assert bool(table[:19].all()) and int((~table).sum()) == 10


def test_all_compute_is_exact_and_leaves_no_trace(transformer, trajectory, branches, loop):
    before = loop()(transformer, 3, 2)
    state = {id(m): set(m.__dict__) for m in transformer.modules()}
    full = CacheSchedule.full(trajectory.timesteps, branches)
    with intercepted(transformer, trajectory.timesteps, full):
        assert torch.equal(loop()(transformer, 3, 2), before)
    assert {id(m): set(m.__dict__) for m in transformer.modules()} == state
    assert not transformer._forward_pre_hooks
    assert torch.equal(loop()(transformer, 3, 2), before)


def test_an_exception_leaves_no_trace(transformer, trajectory, alternate, loop):
    before = loop()(transformer, 3, 2)

    def interrupted(denoiser, seed, batch):
        loop(steps=6)(denoiser, seed, batch)
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        intercepted(transformer, trajectory.timesteps, alternate),
    ):
        interrupted(transformer, 3, 2)
    assert not any("forward" in m.__dict__ for m in transformer.modules())
    assert torch.equal(loop()(transformer, 3, 2), before)


def test_held_steps_are_held_and_change_the_picture(transformer, trajectory, alternate, loop):
    clock = Clock(trajectory.timesteps)
    patches = [Follow(transformer, clock), *apply_schedule_(transformer, alternate, clock)]
    out = loop()(transformer, 3, 2)
    assert [p.call.counts for p in patches[1:]] == [[3, 3]] * 9
    for patch in reversed(patches):
        patch.remove()
    assert not torch.equal(out, loop()(transformer, 3, 2))


def test_runs_are_isolated(transformer, trajectory, alternate, loop):
    with intercepted(transformer, trajectory.timesteps, alternate):
        alone = loop()(transformer, 3, 2)
        loop()(transformer, 40, 2)
        assert torch.equal(loop()(transformer, 3, 2), alone)


def test_a_run_that_was_cut_short_does_not_reach_the_next(transformer, trajectory, alternate, loop):
    def cut(module, args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    calls = 0
    with intercepted(transformer, trajectory.timesteps, alternate):
        alone = loop()(transformer, 3, 2)
        hook = transformer.register_forward_pre_hook(cut)
        with pytest.raises(KeyboardInterrupt):
            loop()(transformer, 40, 2)
        hook.remove()
        assert torch.equal(loop()(transformer, 3, 2), alone)


def test_batched_equals_split(transformer, trajectory, alternate, loop):
    with intercepted(transformer, trajectory.timesteps, alternate):
        together, apart = loop()(transformer, 3, 3), loop(split=True)(transformer, 3, 3)
    assert (together - apart).norm() <= 1e-6 * 6 * together.norm()


def test_streams_keep_apart_in_any_order(transformer, trajectory, alternate):
    """Rows in another order, and in other groups, at every step: each finds its own."""

    def calls(groups):
        clock = Clock(trajectory.timesteps)
        follow = Follow(transformer, clock)
        patches = apply_schedule_(transformer, alternate, clock)
        out = torch.zeros(2, 4, 4, 8, 8)
        for step, rows in enumerate(groups):
            for group in rows:
                inputs = trajectory.calls[step].inputs
                picked = {
                    k: v[group] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
                }
                with torch.no_grad():
                    out[step, group] = transformer(**picked)[0]
        for patch in [*reversed(patches), follow]:
            patch.remove()
        return out

    # the unconditional rows 0 and 1 have equal prompts: they are told apart by their order alone
    plain = calls([[[0, 1, 2, 3]], [[0, 1, 2, 3]]])
    shuffled = calls([[[0, 1, 2, 3]], [[3], [0, 1, 2]]])
    assert (plain - shuffled).norm() <= 1e-6 * plain.norm()
    regrouped = calls([[[3], [0, 1], [2]], [[2, 3], [0, 1]]])
    assert (plain - regrouped).norm() <= 1e-6 * plain.norm()


def test_shapes_that_change_in_mid_run_recompute(transformer, trajectory, alternate):
    clock = Clock(trajectory.timesteps)
    patches = [Follow(transformer, clock), *apply_schedule_(transformer, alternate, clock)]
    inputs = [trajectory.calls[i].inputs for i in (0, 1)]
    small = {"hidden_states": inputs[1]["hidden_states"][..., :4, :4].contiguous()}
    with torch.no_grad():
        transformer(**inputs[0])
        found = transformer(**inputs[1] | small)[0]
    assert [p.call.counts for p in patches[1:]] == [[2, 0]] * 9
    for patch in reversed(patches):
        patch.remove()
    with torch.no_grad():
        assert torch.equal(found, transformer(**inputs[1] | small)[0])


def test_a_copy_of_a_laid_model_has_its_own_slots(transformer, trajectory, alternate, loop):
    clock = Clock(trajectory.timesteps)
    patches = [Follow(transformer, clock), *apply_schedule_(transformer, alternate, clock)]
    alone = loop()(transformer, 3, 2)
    twin = copy.deepcopy(transformer)
    assert torch.equal(loop()(twin, 3, 2), alone)
    theirs = twin.get_submodule("transformer_blocks.0.ff").__dict__["forward"].__self__.call
    mine = transformer.get_submodule("transformer_blocks.0.ff").__dict__["forward"].__self__.call
    assert theirs.slot is not mine.slot
    assert theirs.counts == [6, 6] and mine.counts == [3, 3]
    for patch in reversed(patches):
        patch.remove()


def test_a_branch_that_returns_a_tuple_is_held_whole():
    class Pair(torch.nn.Module):
        def forward(self, *, hidden):
            return hidden + 1, hidden * 2

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Pair()

        def forward(self, x, timestep):
            a, b = self.attn(hidden=x)
            return a + b

    model = Model()
    schedule = CacheSchedule.steps((True, False), (1.0, 0.0), ("attn",))
    with intercepted(model, schedule.timesteps, schedule):
        first = model(torch.ones(2, 3), 1.0)
        assert torch.equal(model(torch.zeros(2, 3), 0.0), first)
        assert torch.equal(model(torch.zeros(1, 3), 0.0), first[:1])


def test_a_slot_shares_no_memory_with_what_computes_or_reuses() -> None:
    """The soft routing of the router's training stores and finds in slots as well."""
    clock, slot = Clock((9.0, 5.0)), Slot()
    clock.tick(9.0, ("a", "b"))
    out = (torch.ones(2, 3), None)
    slot.store(clock, (3,), out)
    out[0].zero_()
    slot.find(clock, (3,))[0].zero_()
    assert torch.equal(slot.find(clock, (3,))[0], torch.ones(2, 3))
