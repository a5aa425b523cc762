"""Every policy: a valid schedule, the ratio it promises, the numbers of the papers."""

import itertools

import pytest
import torch

import tenuto as tn
from tenuto.caching.interval import Interval, LateInterval, interval_for, late_interval_for
from tenuto.caching.random_table import RandomTable
from tenuto.caching.step_programme import StepProgramme, cheapest

TIMES = tuple(float(t) for t in range(950, -1, -50))  # 20 steps
BRANCHES = tuple(f"b{i}" for i in range(36))
FALLING = tuple(10.0**-i for i in range(20))
POLICIES = [
    Interval(2),
    Interval(3, phase="last"),
    Interval(3, reused=1),
    LateInterval(4, 3),
    StepProgramme(0.5, FALLING),
    RandomTable(0.3, seed=1),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_gives_a_valid_schedule(policy):
    schedule = policy(TIMES, BRANCHES)
    assert schedule.timesteps == TIMES and schedule.branches == BRANCHES
    assert schedule.table[0].all() and 0 < schedule.reuse_ratio < 1
    assert torch.equal(schedule.table, policy(TIMES, BRANCHES).table)


@pytest.mark.parametrize("policy", POLICIES[:4] + POLICIES[5:], ids=str)
def test_a_policy_runs_on_a_model(policy, transformer, trajectory, branches, loop):
    from tenuto.calibration.router.rollout import intercepted

    with intercepted(transformer, trajectory.timesteps, policy(trajectory.timesteps, branches)):
        alone = loop()(transformer, 3, 2)
        loop()(transformer, 40, 2)
        assert torch.equal(loop()(transformer, 3, 2), alone)


def rows(policy):
    return policy(TIMES, BRANCHES).table[:, 0].tolist()


def test_both_phases_of_fora():
    assert Interval(2)(TIMES, BRANCHES).reuse_ratio == pytest.approx(0.5)
    assert Interval(2, phase="last")(TIMES, BRANCHES).reuse_ratio == pytest.approx(0.45)
    computed = [i for i, c in enumerate(rows(Interval(2, phase="last"))) if c]
    assert [19 - i for i in computed] == [19, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]


@pytest.mark.parametrize(
    ("first", "period", "reuse"),
    [
        (8, 2, 0.30),
        (4, 2, 0.40),
        (6, 3, 0.45),
        (4, 3, 0.50),
        (8, 6, 0.50),
        (3, 3, 0.55),
        (5, 5, 0.60),
        (3, 6, 0.70),
    ],
)
def test_late_intervals_have_the_ratios_that_were_measured(first, period, reuse):
    schedule = LateInterval(first, period)(TIMES, BRANCHES)
    assert schedule.reuse_ratio == pytest.approx(reuse)
    assert schedule.table[: first + 1].all()
    found = late_interval_for(reuse, TIMES, BRANCHES)
    assert any(rows(p) == rows(LateInterval(first, period)) for p in found)


@pytest.mark.parametrize("search", [late_interval_for, interval_for])
@pytest.mark.parametrize("reuse", [0.3, 0.5, 0.6])
def test_a_search_gives_different_schedules_at_the_wanted_ratio(search, reuse):
    found = [rows(p) for p in search(reuse, TIMES, BRANCHES)]
    assert found and all(r.count(False) == round(20 * reuse) for r in found)
    assert len({tuple(r) for r in found}) == len(found)


def test_the_programme_is_the_cheapest_of_all():
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(9, generator=generator).tolist()

    def price(computed, power):
        total, last = 0.0, 0
        for i, done in enumerate(computed):
            last = i if done else last
            total += (i - last) ** power * costs[i]
        return total

    for held, power in itertools.product((1, 4, 6), (1.0, 2.0, 3.0)):
        choices = itertools.combinations(range(1, 9), held)
        tables = [[i not in choice for i in range(9)] for choice in choices]
        best = min(price(t, power) for t in tables)
        found = cheapest(costs, held, power)
        assert found[0] and found.count(False) == held
        assert price(found, power) == pytest.approx(best)


def test_the_programme_refuses_other_steps_than_it_measured():
    with pytest.raises(tn.TenutoError, match="20 steps, not at 10"):
        StepProgramme(0.5, FALLING)(TIMES[:10], BRANCHES)
    with pytest.raises(tn.TenutoError, match="cannot reuse"):
        cheapest((1.0, 1.0), 2, 2.0)


def test_random_tables_differ_by_seed_and_hold_what_was_asked():
    tables = [RandomTable(0.3, s)(TIMES, BRANCHES) for s in range(3)]
    assert all(t.reuse_ratio == pytest.approx(0.3) for t in tables)
    assert not torch.equal(tables[0].table, tables[1].table)
    with pytest.raises(tn.TenutoError, match="cannot reuse"):
        RandomTable(0.96)(TIMES, BRANCHES)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Interval(0),
        lambda: Interval(3, reused=3),
        lambda: Interval(2, phase="middle"),
        lambda: LateInterval(-1, 2),
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(tn.TenutoError):
        wrong()
