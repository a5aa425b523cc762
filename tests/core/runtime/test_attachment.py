"""Invariants 1 to 3 and 7: off is off, all-compute is exact, batched equals split."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import Artifact, CacheSchedule, attach, describe, quantize, record, schemes
from tenuto.errors import ArtifactError, ModelError
from tenuto.model.backbone import layers
from tenuto.model.patches import override_
from tenuto.numerics.scheme import Recipe, Rule
from tenuto.runtime.attachment import quantized
from tenuto.runtime.layers import QLayer
from tenuto.sampling.trajectory import Call

TIMES = (999.0, 749.0, 500.0, 250.0)
QUANTIZED = ("W8A8", "W4A8_STATIC", "W8A16")
Make = Callable[..., Artifact]


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def outputs(denoiser: nn.Module, calls: list[Call]) -> list[Tensor]:
    """What `denoiser` answers to recorded calls, one after another."""
    with torch.no_grad():
        return [first(denoiser(**call.inputs)) for call in calls]


def gap(one: Tensor, other: Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def route(tiny: Any) -> Make:
    """route(kind, share, rows): an artifact with a random table that computes `share` of it."""

    def build(
        kind: str, share: float = 0.5, times: tuple[float, ...] = TIMES, seed: int = 1
    ) -> Artifact:
        model = tiny(kind)
        branches = [b.name for b in describe(model).branches]
        draw = torch.Generator().manual_seed(seed)
        table = torch.rand(len(times), len(branches), generator=draw) < share
        table[0] = True
        schedule = {"timesteps": list(times), "steps": len(times), "guidance": 2.0}
        found = Artifact.new(model, schedule)
        found.header["route"] = {"timesteps": list(times), "branches": branches}
        found.tensors["route/table"] = table
        return found

    return build


@pytest.fixture(params=["route", *QUANTIZED, "both"])
def artifact(request: pytest.FixtureRequest, rounded: Make, route: Make) -> Make:
    """artifact(kind): one of a few artifacts in turn: a route, weights, both."""
    what = request.param

    def build(kind: str) -> Artifact:
        if what == "route":
            return route(kind)
        return rounded(kind) | route(kind) if what == "both" else rounded(kind, what)

    return build


# --- off is off -----------------------------------------------------------------------------------


def test_off_is_off(tiny: Any, kind: str, artifact: Make, loop: Any, bits: Any) -> None:
    """After a run, after a second one, after the context and after detaching twice."""
    model, sample = tiny(kind), loop(kind)
    before = bits(model)
    with torch.no_grad():
        plain = sample(model, 5, 2)
        with attach(model, artifact(kind)) as attached:
            assert bits(model) != before
            changed = sample(model, 5, 2)
            assert torch.equal(sample(model, 5, 2), changed), "a second run is another run"
        assert bits(model) == before
        attached.detach()
        assert bits(model) == before
        assert torch.equal(sample(model, 5, 2), plain)
        assert not torch.equal(changed, plain), "it was not even on"


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
def test_off_after_whatever_happens(
    tiny: Any, kind: str, rounded: Make, route: Make, loop: Any, bits: Any, error: Any
) -> None:
    """In the loop, and deep inside the denoiser, in the middle of a run."""
    model = tiny(kind)
    deep = describe(model).branches[-1].name
    calls: list[int] = []

    def trap(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error

    before = bits(model)
    hook: Any = None
    with pytest.raises(error), attach(model, rounded(kind) | route(kind, 1.0)), torch.no_grad():
        hook = model.get_submodule(deep).register_forward_pre_hook(trap)
        loop(kind)(model, 0, 1)
    hook.remove()
    assert bits(model) == before
    assert len(calls) == 2


def test_a_failure_while_attaching_changes_nothing(
    tiny: Any, kind: str, rounded: Make, route: Make, bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last patch of all cannot be put in: every other one is taken out again."""
    from tenuto.runtime import attachment

    model = tiny(kind)
    before = bits(model)

    def late(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(attachment, "apply_policy_", late)
    with pytest.raises(KeyboardInterrupt):
        attach(model, rounded(kind) | route(kind))
    assert bits(model) == before


def test_refused_before_anything_is_changed(tiny: Any, rounded: Make, bits: Any) -> None:
    model = tiny("dit")
    before = bits(model)
    with pytest.raises(ArtifactError):
        attach(model, rounded("pixart"))
    broken = rounded("dit")
    del broken.tensors["weights/proj_out_2.qdata"]
    with pytest.raises(ArtifactError, match="proj_out_2"):
        attach(model, broken)
    with pytest.raises(ModelError):
        attach(object(), rounded("dit"))
    assert bits(model) == before


def test_one_inside_another(
    tiny: Any, kind: str, rounded: Make, route: Make, loop: Any, bits: Any
) -> None:
    """A route, and quantization on top of it: taken out in turn, each leaves what was before."""
    model = tiny(kind)
    before = bits(model)
    with torch.no_grad(), attach(model, route(kind)) as outer:
        middle = bits(model)
        held = loop(kind)(model, 1, 1)
        with attach(model, rounded(kind)):
            loop(kind)(model, 1, 1)
        assert bits(model) == middle
        assert torch.equal(loop(kind)(model, 1, 1), held)
        assert sum(h for _, h in outer.counts().values()) > 0
    assert bits(model) == before


def test_another_patch_on_top_is_not_torn_out(tiny: Any, route: Make, bits: Any) -> None:
    """Detaching in the wrong order is refused, and can be done in the right one afterwards."""
    model = tiny("dit")
    before = bits(model)
    attached = attach(model, route("dit"))
    branch = model.get_submodule(describe(model).branches[-1].name)
    theirs = override_(branch, lambda original, module, *args, **kwargs: original(*args, **kwargs))
    with pytest.raises(ModelError, match="on top"):
        attached.detach()
    theirs.remove()
    attached.detach()
    assert bits(model) == before


def test_hooks_of_others_stay(tiny: Any, rounded: Make, route: Make) -> None:
    model, seen = tiny("dit"), []
    model.register_forward_pre_hook(lambda m, args: seen.append("mine"))
    own = len(model._forward_pre_hooks)
    with attach(model, rounded("dit") | route("dit")):
        pass
    assert len(model._forward_pre_hooks) == own == 1


def test_released_there_is_no_way_back(tiny: Any, rounded: Make) -> None:
    model = tiny("dit")
    attached = attach(model, rounded("dit"))
    attached.release()
    with pytest.raises(ModelError, match="load the model again"):
        attached.detach()
    assert sum(1 for _ in layers(model)) == 0


def test_moved_and_cast_while_attached(tiny: Any, rounded: Make, bits: Any, loop: Any) -> None:
    """What was taken out follows the model: a cast while attached must not come apart after it."""
    model, sample = tiny("dit"), loop("dit", steps=1)
    attached = attach(model, rounded("dit"))
    model.to(torch.float64)
    attached.detach()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.isfinite(sample(model.float(), 0, 1)).all()


# --- copies ---------------------------------------------------------------------------------------


def test_a_copy_of_an_attached_model(
    tiny: Any, kind: str, artifact: Make, loop: Any, bits: Any
) -> None:
    """It computes the same, has stored features of its own, and outlives the original's patches."""
    model, sample = tiny(kind), loop(kind)
    before = bits(model)
    with torch.no_grad():
        with attach(model, artifact(kind)) as attached:
            expected = sample(model, 3, 2)
            twin = copy.deepcopy(model)
            assert torch.equal(sample(twin, 3, 2), expected)
            counts = attached.counts()
            assert torch.equal(sample(model, 3, 2), expected)
            if counts:
                assert attached.counts() != counts, "the copy does not count here"
        assert bits(model) == before
        assert torch.equal(sample(twin, 3, 2), expected)


def test_copies_hold_apart(tiny: Any, kind: str, route: Make, recorded: Any) -> None:
    """Two copies in turn, step by step, of the same prompts: neither takes the other's features."""
    model, calls = tiny(kind), recorded(kind).calls[:4]
    louder = [Call(0, c.row, c.timestep, dict(c.inputs)) for c in calls]
    for call in louder:
        name = next(iter(call.inputs))
        call.inputs[name] = call.inputs[name] * 1.5
    with attach(model, route(kind, share=0.0)):
        twin = copy.deepcopy(model)
        one, other = outputs(model, calls), outputs(twin, louder)
        for place in range(4):
            assert torch.equal(outputs(model, calls[place : place + 1])[0], one[place])
            assert torch.equal(outputs(twin, louder[place : place + 1])[0], other[place])


def test_a_copy_has_a_run_of_its_own(tiny: Any, kind: str, route: Make, recorded: Any) -> None:
    """A whole run of a copy between two steps of the original: that goes on where it was."""
    model, calls = tiny(kind), recorded(kind).calls[:4]
    with attach(model, route(kind, share=0.0)) as attached:
        twin = copy.deepcopy(model)
        expected = outputs(twin, calls)
        found = outputs(model, calls[:2])
        outputs(twin, calls)
        assert attached.clock.step == 1
        found += outputs(model, calls[2:])
        assert all(counts == [1, 3] for counts in attached.counts().values())
    assert all(map(torch.equal, found, expected))


def test_quantized_leaves_the_callers_model(
    tiny: Any, kind: str, artifact: Make, loop: Any, bits: Any
) -> None:
    model, sample = tiny(kind), loop(kind)
    before = bits(model)
    with torch.no_grad():
        twin = quantized(model, artifact(kind)).denoiser
        own = sample(twin, 0, 1)
        with attach(model, artifact(kind)):
            assert torch.equal(sample(model, 0, 1), own)
    assert bits(model) == before
    memory = {p.data_ptr() for p in model.parameters()}
    assert not memory & {p.data_ptr() for p in twin.parameters()}


def test_recording_and_quantizing_leave_the_callers_model(
    tiny: Any, kind: str, loop: Any, bits: Any
) -> None:
    """Invariant 7, in training mode, with gradients off for some weights."""
    model = tiny(kind).train()
    next(model.parameters()).requires_grad_(False)
    before = bits(model)
    trajectory = record(model, sample=loop(kind, steps=2), batch=1, runs=1)
    assert bits(model) == before
    quantize(model, schemes.W8A8_STATIC, trajectory)
    assert bits(model) == before


# --- all-compute is exact -------------------------------------------------------------------------


def test_a_schedule_that_never_reuses_changes_no_bit(
    tiny: Any, kind: str, route: Make, recorded: Any, loop: Any
) -> None:
    model, calls = tiny(kind), recorded(kind).calls
    with torch.no_grad():
        plain, picture = outputs(model, calls), loop(kind)(model, 0, 2)
        with attach(model, route(kind, share=1.1)) as attached:
            assert all(map(torch.equal, outputs(model, calls), plain))
            assert torch.equal(loop(kind)(model, 0, 2), picture)
            assert sum(held for _, held in attached.counts().values()) == 0


def test_computed_branches_are_exact_too(tiny: Any, kind: str, route: Make, recorded: Any) -> None:
    """At the first step of a run everything is computed, whatever the table says of later ones."""
    model, calls = tiny(kind), recorded(kind).calls
    plain = outputs(model, calls)
    with attach(model, route(kind, share=0.0)):
        found = outputs(model, calls)
    for call, one, other in zip(calls, found, plain, strict=True):
        assert torch.equal(one, other) == (call.row == 0)


def test_without_its_route(tiny: Any, rounded: Make, route: Make, recorded: Any) -> None:
    model, calls = tiny("dit"), recorded("dit").calls
    with attach(model, rounded("dit")):
        plain = outputs(model, calls)
    with attach(model, rounded("dit") | route("dit", 0.0), route=False) as attached:
        assert all(map(torch.equal, outputs(model, calls), plain))
        assert attached.counts() == {}


# --- what is stored ------------------------------------------------------------------------------


def test_counts_are_those_of_the_table(tiny: Any, kind: str, route: Make, loop: Any) -> None:
    model, artifact = tiny(kind), route(kind)
    with attach(model, artifact) as attached, torch.no_grad():
        loop(kind)(model, 0, 1)
        loop(kind)(model, 0, 1)
        found = attached.counts()
    table = artifact.tensors["route/table"]
    for name, column in zip(artifact.header["route"]["branches"], table.t(), strict=True):
        if not bool(column.all()):
            assert found[name] == [2 * int(column.sum()), 2 * int((~column).sum())], name


def test_held_features_are_those_of_the_step_before(
    tiny: Any, kind: str, route: Make, recorded: Any
) -> None:
    """By hand: branch outputs of each call kept, and put in where the table says so."""
    model, calls = tiny(kind), recorded(kind).calls[:4]
    artifact = route(kind)
    names, table = artifact.header["route"]["branches"], artifact.tensors["route/table"]
    with attach(model, artifact):
        found = outputs(model, calls)
    kept: dict[str, Any] = {}
    row = 0

    def by_hand(name: str, column: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            if not column[row]:
                return kept[name]
            kept[name] = out
            return out

        return hook

    for name, column in zip(names, table.t(), strict=True):
        model.get_submodule(name).register_forward_hook(by_hand(name, column))
    expected = []
    for call in calls:
        row = call.row
        expected += outputs(model, [call])
    assert all(map(torch.equal, found, expected))


def test_a_host_that_writes_in_place_changes_no_later_step(
    tiny: Any, kind: str, route: Make, recorded: Any
) -> None:
    """Writing into what a branch returned, computed or reused, gives the same as not doing so."""
    model, calls, artifact = tiny(kind), recorded(kind).calls[:4], route(kind, share=0.0)
    with attach(model, artifact):
        found = _outputs_with_hooks(model, calls, artifact, lambda out: out * 2)
    with attach(model, artifact):
        written = _outputs_with_hooks(model, calls, artifact, lambda out: out.mul_(2))
    assert all(map(torch.equal, written, found))


def _outputs_with_hooks(
    model: nn.Module, calls: list[Call], artifact: Artifact, change: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """The outputs of `calls` where a hook changes what each branch returns."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return change(out) if isinstance(out, Tensor) else tuple(map(change, out))

    names = artifact.header["route"]["branches"]
    hooks = [model.get_submodule(name).register_forward_hook(hook) for name in names]
    try:
        return outputs(model, calls)
    finally:
        for handle in hooks:
            handle.remove()


def test_runs_are_isolated(tiny: Any, kind: str, route: Make, recorded: Any) -> None:
    """Of the same prompts, one after another: nothing that a run left is used by the next one."""
    model, artifact = tiny(kind), route(kind, share=0.0)
    calls = recorded(kind).calls[:4]
    with attach(model, artifact):
        fresh = outputs(model, calls[1:])
        outputs(model, calls)
        assert all(map(torch.equal, outputs(model, calls[1:]), fresh))


@pytest.mark.parametrize("start", [1, 3])
def test_partial_denoising(tiny: Any, kind: str, route: Make, loop: Any, start: int) -> None:
    """Image-to-image starts in mid-schedule: its first call computes, even right after a run."""
    model, sample = tiny(kind), loop(kind, start=start)
    with attach(model, route(kind, share=0.0)) as attached, torch.no_grad():
        fresh = sample(model, 1, 2)
        loop(kind, start=0)(model, 1, 2)
        before = attached.counts()
        assert torch.equal(sample(model, 1, 2), fresh)
        after = attached.counts()
    for name, (computed, held) in after.items():
        assert computed - before[name][0] == 1
        assert held - before[name][1] == 3 - start


@pytest.mark.parametrize("steps", [1, 3, 8, 13])
def test_other_step_counts(tiny: Any, kind: str, route: Make, loop: Any, steps: int) -> None:
    """Each maps to the nearest calibrated step; the first one computes."""
    model, artifact = tiny(kind), route(kind, share=0.4)
    names, table = artifact.header["route"]["branches"], artifact.tensors["route/table"]
    sample = loop(kind, steps=steps)
    rows = [min(range(4), key=lambda i: abs(TIMES[i] - t)) for t in sample.times().tolist()]
    with attach(model, artifact) as attached, torch.no_grad():
        assert torch.isfinite(sample(model, 0, 1)).all()
        found = attached.counts()
    for name, column in zip(names, table.t(), strict=True):
        if not bool(column.all()):
            assert found[name][0] == sum(bool(column[row]) for row in rows)


def test_second_order_samplers(tiny: Any, kind: str, artifact: Make, loop: Any) -> None:
    """Two calls a step: one run, the same each time, and near the plain one."""
    model, sample = tiny(kind), loop(kind, heun=True)
    with torch.no_grad(), attach(model, artifact(kind)) as attached:
        found = sample(model, 2, 2)
        run = attached.clock.run
        assert torch.equal(sample(model, 2, 2), found)
        assert attached.clock.run == run + 1
    assert torch.isfinite(found).all()


def test_shapes_that_change_in_mid_run_compute(
    tiny: Any, route: Make, call_as: Any, conditions: Any
) -> None:
    """Another size, another batch: what is stored does not fit, so nothing of it is used."""
    for kind in ("pixart", "unet"):
        model = tiny(kind)
        given = conditions(kind, [1, 2])
        draw = torch.Generator().manual_seed(0)
        small, big = (torch.randn(2, 4, n, n, generator=draw) for n in (8, 16))
        with torch.no_grad():
            late, plain = torch.tensor(250), call_as(kind, model, big, torch.tensor(250), given)
            with attach(model, route(kind, share=0.0)) as attached:
                call_as(kind, model, small, torch.tensor(999), given)
                assert torch.equal(call_as(kind, model, big, late, given), plain)
                assert sum(held for _, held in attached.counts().values()) == 0
                again = call_as(kind, model, big, late, given)
                assert torch.equal(again, call_as(kind, model, big, late, given))
                assert sum(held for _, held in attached.counts().values()) > 0


def test_nested_runs(tiny: Any, route: Make, loop: Any) -> None:
    """A run inside a step of another, of the same prompts: neither takes the other's features."""
    model, run = tiny("dit"), loop("dit")
    inner = loop("dit", steps=3)

    def nested(seed: int) -> tuple[Tensor, Tensor]:
        x, found = run.noise(seed, 2), None
        seeds, times = [seed, seed + 1], run.times()
        for place, t in enumerate(times):
            if place == 2:
                found = inner(model, seed, 2)
            v = run.guided(model, x, t, seeds)
            after = times[place + 1] if place < 3 else torch.tensor(0)
            x = run.step(x, v, t, after)
        assert found is not None
        return x, found

    with attach(model, route("dit", share=0.0)), torch.no_grad():
        alone = inner(model, 4, 2)
        outer, found = nested(4)
        again, _ = nested(4)
        run(model, 4, 2)
        inner(model, 4, 2)
        third, _ = nested(4)
    assert torch.equal(found, alone)
    assert torch.equal(outer, again) and torch.equal(outer, third)


# --- batched equals split -------------------------------------------------------------------------


def split(inputs: dict[str, Any], batch: int, part: list[int]) -> dict[str, Any]:
    """The rows `part` of a recorded call."""
    return {
        k: v[part] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v
        for k, v in inputs.items()
    }


PLANS = {
    "halves": [[0, 1, 2], [3, 4, 5]],
    "halves turned": [[3, 4, 5], [0, 1, 2]],
    "three conditionings": [[2, 0, 1], [5, 4], [3]],
    "all at once, turned": [[5, 4, 3, 2, 1, 0]],
}


@pytest.fixture(scope="module")
def distinct(tiny: Any, conditions: Any) -> Callable[[str], list[Call]]:
    """distinct(kind): calls of one run, six rows with conditions of their own."""

    def build(kind: str) -> list[Call]:
        given = conditions(kind, [1, 2, 3, 4, 5, 6])
        names = {"pixart": "encoder_hidden_states", "unet": "encoder_hidden_states",
                 "dit": "class_labels", "home": "labels"}  # fmt: skip
        first_name = {"pixart": "hidden_states", "dit": "hidden_states", "unet": "sample"}
        times = torch.tensor([int(t) for t in TIMES])
        calls = []
        for row, t in enumerate(times):
            draw = torch.Generator().manual_seed(row)
            x = torch.randn(6, 4 if kind in ("pixart", "unet") else 3, 8, 8, generator=draw)
            step = {"timestep": t[None].expand(6)} if kind in ("pixart", "dit") else {}
            step = step or {"timestep" if kind == "unet" else "t": t}
            inputs = {first_name.get(kind, "x"): x, names[kind]: next(iter(given.values())), **step}
            calls.append(Call(0, row, float(t), inputs))
        return calls

    return build


@pytest.mark.parametrize("what", ["route", "W8A8", "W4A8_STATIC", "both", "both static"])
def test_batched_equals_split(
    tiny: Any, kind: str, rounded: Make, route: Make, distinct: Any, what: str
) -> None:
    """Row by row, at every step of a run, in any order of the calls."""
    made = {
        "route": lambda: route(kind),
        "both": lambda: rounded(kind) | route(kind),
        "both static": lambda: rounded(kind, "W4A8_STATIC") | route(kind),
    }
    artifact = made[what]() if what in made else rounded(kind, what)
    calls, model, plain = distinct(kind), tiny(kind), tiny(kind)
    untouched = outputs(plain, calls)
    with attach(model, artifact):
        whole = outputs(model, calls)
    for name, plan in PLANS.items():
        worst = noise = 0.0
        with attach(model, artifact) as attached:
            for call, one, other in zip(calls, whole, untouched, strict=True):
                for part in plan:
                    some = Call(0, call.row, call.timestep, split(call.inputs, 6, part))
                    worst = max(worst, gap(outputs(model, [some])[0], one[part]))
                    noise = max(noise, gap(outputs(plain, [some])[0], other[part]))
            held = sum(h for _, h in attached.counts().values())
        assert noise < 3e-6, "a float model's own sums already differ"
        assert worst <= (1e-6 + 2 * noise if what == "route" else 1e-3), name
        assert (held > 0) == (what not in QUANTIZED), name


def test_streams_are_gathered_from_wherever_they_are(
    tiny: Any, kind: str, route: Make, distinct: Any
) -> None:
    """Stored in two calls, reused in one, and the other way round: each row finds its own."""
    model, calls = tiny(kind), distinct(kind)
    table = route(kind, share=0.0)
    with attach(model, table):
        expected = outputs(model, calls)[1]
    for stored, used in (
        (PLANS["halves"], [[0, 1, 2, 3, 4, 5]]),
        ([[5, 3, 1], [0, 2, 4]], [[4, 1]]),
    ):
        with attach(model, table) as attached:
            for part in stored:
                outputs(model, [Call(0, 0, 999.0, split(calls[0].inputs, 6, part))])
            for part in used:
                (found,) = outputs(model, [Call(0, 1, 749.0, split(calls[1].inputs, 6, part))])
                assert gap(found, expected[part]) <= 1e-6
            assert all(held == len(used) for _, held in attached.counts().values())


def test_guidance_in_one_call_or_two(tiny: Any, kind: str, route: Make, loop: Any) -> None:
    """The whole image; the noise of the sums grows over the steps, and no more than that."""
    model = tiny(kind)
    with attach(model, route(kind)), torch.no_grad():
        together, apart = loop(kind)(model, 1, 2), loop(kind, split=True)(model, 1, 2)
    assert gap(apart, together) < 1e-4


def test_an_unknown_row_computes(tiny: Any, kind: str, route: Make, distinct: Any) -> None:
    """A row that joins in mid-run has nothing held: its call computes for all, and says so."""
    model, calls = tiny(kind), distinct(kind)
    late = Call(0, 2, TIMES[2], split(calls[2].inputs, 6, [0, 5]))
    (plain,) = outputs(model, [late])
    with attach(model, route(kind, share=0.0)) as attached:
        outputs(model, [Call(0, 0, 999.0, split(calls[0].inputs, 6, [0, 1, 2]))])
        assert torch.equal(outputs(model, [late])[0], plain)
        assert sum(held for _, held in attached.counts().values()) == 0


# --- what it says of itself -----------------------------------------------------------------------


def test_execution_is_reported(tiny: Any, kind: str, rounded: Make, route: Make) -> None:
    model = tiny(kind)
    count = sum(1 for _ in layers(model))
    expected = {
        "W8A8": "int8", "W4A8_STATIC": "int8", "W8A16": "weight-only", "W4A16": "weight-only",
    }  # fmt: skip
    for scheme, mode in expected.items():
        inside = len(rounded(kind, scheme).header["layers"])
        assert inside < count, "the time-only ones are a table"
        with attach(model, rounded(kind, scheme), execution="int8") as attached:
            assert attached.execution() == {"mode": mode, "layers": {mode: inside}}
            assert attached.int8_weight_share() == (1.0 if mode == "int8" else 0.0)
    inside = len(rounded(kind).header["layers"])
    with attach(model, rounded(kind), simulate=True) as attached:
        assert attached.execution() == {"mode": "simulated", "layers": {"simulated": inside}}
    with attach(model, route(kind)) as attached:
        assert attached.execution() == {"mode": "float", "layers": {"float": count}}
        assert attached.int8_weight_share() == 0.0


def test_a_layer_takes_its_input_by_name(tiny: Any, rounded: Make) -> None:
    """As torch's own do: the motion modules of diffusers call theirs so."""
    model, x = tiny("home"), torch.randn(2, 4, 32)
    with attach(model, rounded("home"), execution="int8"):
        assert isinstance(model.head, QLayer)
        assert torch.equal(model.head(input=x), model.head(x))


def test_the_share_counts_weights(tiny: Any, recorded: Any) -> None:
    model = tiny("dit")
    recipe = Recipe((Rule("*.ff.*", schemes.W8A8), Rule("*.attn1.*", schemes.W8A16)))
    artifact = quantize(model, recipe, recorded("dit"))
    sizes = {n: m.weight.numel() for n, m in layers(model)}
    share = sum(s for n, s in sizes.items() if ".ff." in n) / sum(sizes.values())
    with attach(model, artifact, execution="int8") as attached:
        assert attached.int8_weight_share() == pytest.approx(share)
        assert attached.execution()["mode"] == "mixed"
        quantized_now = [n for n, m in model.named_modules() if isinstance(m, QLayer)]
        assert all(".ff." in n or ".attn1." in n for n in quantized_now)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8_STATIC"])
def test_executed_equals_simulated(
    tiny: Any, kind: str, rounded: Make, recorded: Any, scheme: str
) -> None:
    """In the whole model: each code on an edge that falls the other way moves later ones too."""
    calls, artifact = recorded(kind).calls[:4], rounded(kind, scheme)
    one, other = tiny(kind), tiny(kind)
    plain = torch.cat(outputs(tiny(kind), calls))
    with attach(one, artifact, execution="int8"), attach(other, artifact, simulate=True):
        executed, simulated = torch.cat(outputs(one, calls)), torch.cat(outputs(other, calls))
    assert gap(executed, simulated) < 0.4 * gap(executed, plain)
    assert gap(executed, plain) == pytest.approx(gap(simulated, plain), rel=0.2)


def test_eight_bits_are_near_and_four_are_farther(
    tiny: Any, kind: str, rounded: Make, recorded: Any
) -> None:
    model, calls = tiny(kind), recorded(kind).calls
    plain, gaps = outputs(model, calls), {}
    for scheme in ("W8A16", "W8A8", "W8A8_STATIC", "W4A16"):
        with attach(model, rounded(kind, scheme), execution="int8"):
            found = outputs(model, calls)
        gaps[scheme] = gap(torch.cat(found), torch.cat(plain))
    assert 0 < gaps["W8A16"] < gaps["W8A8"] < gaps["W4A16"]
    assert gaps["W8A8"] < 0.08 and gaps["W8A8_STATIC"] < 0.12


# --- pipelines ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tiny_pixart_folder: Path) -> Any:
    from diffusers import PixArtAlphaPipeline

    found = PixArtAlphaPipeline.from_pretrained(tiny_pixart_folder)
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipe: Any, steps: int = 4, **options: Any) -> Any:
    return pipe(
        "a red school bus", num_inference_steps=steps, guidance_scale=2.0, output_type="pt",
        generator=torch.Generator().manual_seed(0), use_resolution_binning=False,
        clean_caption=False, **options,
    ).images  # fmt: skip


def test_a_pipeline_from_end_to_end(pipe: Any, bits: Any) -> None:
    """What the README shows: record, quantize, merge a route, attach, draw, and off again."""
    before, plain = bits(pipe.transformer), draw(pipe)
    trajectory = record(pipe, ["a dog", "a cat"], steps=4, guidance=2.0)
    artifact = quantize(pipe, schemes.W8A8_STATIC, trajectory)
    branches = [b.name for b in describe(pipe.transformer).branches]
    table = CacheSchedule.steps([True, False, True, False], trajectory.timesteps, branches)
    route = Artifact.new(pipe, trajectory.schedule())
    route.header["route"] = {"timesteps": list(table.timesteps), "branches": branches}
    route.tensors["route/table"] = table.table
    with attach(pipe, artifact | route) as attached:
        assert attached.denoiser is pipe.transformer
        one = draw(pipe)
        assert all(counts == [2, 2] for counts in attached.counts().values())
        assert torch.equal(draw(pipe), one)
        draw(pipe, steps=7)
        draw(pipe, num_images_per_prompt=2)
    assert bits(pipe.transformer) == before
    assert torch.equal(draw(pipe), plain)
    assert 0 < float((one - plain).abs().mean()) < 0.1
    assert artifact.header["prediction_type"] == "v_prediction"


def test_an_interrupted_pipeline_leaves_nothing_to_the_next_run(
    pipe: Any, route_of: Callable[[Any], Artifact]
) -> None:
    artifact = route_of(pipe)

    def interrupt(pipeline: Any, step: int, t: Any, given: Any) -> Any:
        if step == 1:
            raise KeyboardInterrupt
        return given

    with attach(pipe, artifact):
        expected = draw(pipe)
        hook = pipe.transformer.register_forward_hook(_raise_at(2))
        with suppress(KeyboardInterrupt):
            draw(pipe)
        hook.remove()
        assert torch.equal(draw(pipe), expected)


def _raise_at(number: int) -> Callable[..., None]:
    calls: list[int] = []

    def hook(*args: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt

    return hook


@pytest.fixture
def route_of() -> Iterator[Callable[[Any], Artifact]]:
    """A route that reuses everything after the first step."""

    def build(pipe: Any) -> Artifact:
        branches = [b.name for b in describe(pipe.transformer).branches]
        schedule = {"timesteps": list(TIMES), "steps": 4, "guidance": 2.0}
        found = Artifact.new(pipe, schedule)
        found.header["route"] = {"timesteps": list(TIMES), "branches": branches}
        found.tensors["route/table"] = torch.zeros(4, len(branches), dtype=torch.bool)
        found.tensors["route/table"][0] = True
        return found

    yield build


def test_the_clock_follows_a_pipeline(pipe: Any, route_of: Callable[[Any], Artifact]) -> None:
    """One run an image, rows in order; and the clock sees each half of guidance as a stream."""
    rows: list[tuple[int, int]] = []
    with attach(pipe, route_of(pipe)) as attached:
        hook = pipe.transformer.register_forward_hook(
            lambda *_: rows.append((attached.clock.run, attached.clock.step))
        )
        draw(pipe)
        draw(pipe)
        hook.remove()
        assert len(set(attached.clock.streams)) == 2
    assert [row for _, row in rows] == [0, 1, 2, 3] * 2
    assert len({run for run, _ in rows[:4]}) == 1 and rows[0][0] != rows[4][0]
    assert all(a[1] <= b[1] for a, b in pairwise(rows[:4]))
