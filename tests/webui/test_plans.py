"""From a budget to a table: what calibration measured decides, and the limits hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tenuto.artifact import Artifact, schedule_of
from tenuto.caching import CacheSchedule, unmeasured
from tenuto.errors import ArtifactError
from tenuto.runtime import Replacements
from tenuto.sampling import OutputKernel
from webui_ext import adapter
from webui_ext.cache import Limits, Plan
from webui_ext.choices import AUTO, CACHES, OFF, ROUTER, RULES, Choices, infotext, pasted
from webui_ext.plans import at_budget, cache_of, chosen_of, share
from webui_ext.run import Run

UNIFORM = "Uniform"
BRANCHES = ("a", "b", "c")
TIMES = [999.0 - 50 * i for i in range(20)]


def artifact(policy: str = "late interval 5/2", **tensors: Any) -> Artifact:
    """A route of 20 steps that holds every second one, but for the first six."""
    table = torch.ones(20, 3, dtype=torch.bool)
    table[6::2] = False
    header = {"route": {"timesteps": TIMES, "branches": list(BRANCHES), "policy": policy}}
    found = {f"route/{name}": value for name, value in tensors.items()}
    return Artifact(header, {"route/table": table, **found})


def at_speed(made: Artifact, speed: float) -> CacheSchedule:
    """The artifact's route at a speed."""
    route = schedule_of(made)
    assert route is not None
    return at_budget(made, 1 - 1 / speed)(route)


def plan_of(choices: Choices, monkeypatch: Any) -> Plan | None:
    """The plan for a model of `BRANCHES` without an artifact."""
    monkeypatch.setattr(adapter, "branches_of", lambda _: BRANCHES)
    module = torch.nn.Identity()
    return adapter.plan_of(module, chosen_of(choices, None, OFF), Replacements({}))


def test_the_route_itself_where_it_is_as_fast() -> None:
    made = artifact(costs=torch.ones(20))
    found = at_speed(made, 1 / (1 - 7 / 20))
    assert torch.equal(found.table, made.tensors["route/table"])


@pytest.mark.parametrize("speed", [1.25, 2.0, 4.0, 8.0])
def test_the_costs_of_the_steps(speed: float) -> None:
    """The cheapest steps are reused, as many as the budget wants."""
    costs = torch.linspace(10, 1, 20)
    found = at_speed(artifact(costs=costs), speed)
    assert found.reuse_ratio == pytest.approx(1 - 1 / speed, abs=0.03)
    assert bool(found.table[0].all())
    held = (~found.table[:, 0]).nonzero().flatten()
    assert float(held.float().mean()) > 9.5, "late steps cost less"


def test_the_scores_where_the_router_was_the_best() -> None:
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    made = artifact("router spread 1", logits=logits, costs=torch.ones(20))
    found = at_speed(made, 2.0)
    assert found.reuse_ratio == pytest.approx(0.5, abs=0.02)
    assert float(logits[~found.table].max()) < float(logits[1:][found.table[1:]].min()) + 1e-6
    assert len({tuple(row) for row in found.table.tolist()}) > 2, "cells, not whole steps"


def test_a_route_that_nothing_is_known_of_stays_and_none_is_refused() -> None:
    made = artifact()
    assert torch.equal(at_speed(made, 4.0).table, made.tensors["route/table"])
    with pytest.raises(ArtifactError, match="no cache schedule"):
        cache_of(Choices(cache=ROUTER), Artifact({}, {}))


def test_auto_skips_calls_unless_the_file_has_a_schedule_alone() -> None:
    """What was measured on the model goes before what was not."""
    kernel = OutputKernel(
        torch.eye(20, dtype=torch.float64), tuple(TIMES), (0.6,) * 20, (0.8,) * 20, "eps", 2
    )
    both = artifact(costs=torch.ones(20)).add_forecast(kernel)
    bare, forecast = Artifact({}, {}), Artifact({}, {}).add_forecast(kernel)
    for made, branches in ((None, "policy"), (both, "limit"), (bare, "route"), (forecast, "route")):
        found = cache_of(Choices(speed=3.0), made)
        assert found["speedup"] == 3.0 and found["fallback"] is True
        assert branches in found and ("route" in found) == (branches == "route")
    assert set(cache_of(Choices(), artifact())) == {"limit"}
    assert cache_of(Choices(speed=8.0), None)["speedup"] == 4.0, "no faster than a forecast goes"
    assert cache_of(Choices(speed=1.0), None) == {"route": False}
    assert set(cache_of(Choices(cache=ROUTER), both)) == {"limit"}
    assert cache_of(Choices(speedup=1.5), both) == {"route": False, "speedup": 1.5}


@pytest.mark.parametrize("speed", [1.5, 2.0, 3.0, 8.0])
def test_the_rule_of_the_built_in_ones(speed: float) -> None:
    """First steps, then one of every few; about 1 / speed computes."""
    found = unmeasured(1 - 1 / speed, 3, adapter.GRID, BRANCHES)
    assert found.reuse_ratio == pytest.approx(1 - 1 / speed, abs=0.06)
    if speed <= 3:
        assert bool(found.table[:3].all())


def test_a_column_for_every_branch() -> None:
    made = at_speed(artifact(), 2.0).over(("c", "x", "b", "a"))
    assert bool(made.table[:, 1].all()) and not bool(made.table[:, [0, 2, 3]].all())


def test_no_plan_where_nothing_is_reused(monkeypatch: Any) -> None:
    for choices in (Choices(cache=OFF), Choices(speed=1.0), Choices(cache=UNIFORM, speed=1.0)):
        assert plan_of(choices, monkeypatch) is None
        assert share(choices, None) == 1.0
    assert plan_of(Choices(), monkeypatch) is not None


def test_limits_of_a_plan() -> None:
    policy = RULES[UNIFORM](2)
    plan = Plan(BRANCHES, policy=policy, limits=Limits(0.2, 0.8))
    run = Run()
    run.steps, found = 10, []
    for step in range(10):
        run.step = step
        found.append(plan.reuses(run, 0, 0))
    assert found == [False, False, False, True, False, True, False, True, False, False]
    run.step = 9
    for last in (False, True):
        plan = Plan(BRANCHES, policy=policy, limits=Limits(0.2, 1.0, last))
        assert plan.reuses(run, 0, 0) is not last


def test_the_forecast_counts_what_is_limited() -> None:
    assert share(Choices(cache=UNIFORM, start=0, last=False, longest=0), None) == 0.5
    many = Choices(cache=UNIFORM, speed=8, start=0, last=False, longest=1)
    assert share(many, None) == pytest.approx(0.5, abs=0.1)
    assert share(Choices(), artifact()) == pytest.approx(0.65, abs=0.01)


def test_a_rule_is_found_by_its_file() -> None:
    """The menu has what needs nothing but a period, under the name that old infotexts have."""
    assert (AUTO, OFF, UNIFORM, ROUTER) == CACHES


@pytest.mark.parametrize("cache", CACHES)
def test_an_infotext_is_read_as_it_was_written(cache: str) -> None:
    for scheme in ("W8A8", "W8A16", OFF):
        choices = Choices(enabled=True, cache=cache, start=0.25)
        text = {k: str(v) for k, v in infotext(choices, scheme, None, "1").items() if v is not None}
        found = pasted(text)
        assert found is not None and found.cache == cache and found.start == 0.25
        known = {"W8A8": "W8A8", "W8A16": "From artifact", OFF: OFF}
        assert found.precision == known[scheme]
    assert pasted({"Steps": "20"}) is None and ROUTER in CACHES
