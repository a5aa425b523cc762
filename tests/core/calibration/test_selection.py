"""Disturbance-aware selection: int8 tables, what features are worth, and a budget of bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tenuto import Artifact, attach, describe, quantize, schemes
from tenuto.artifact import localized
from tenuto.calibration.presets import recipe_for
from tenuto.calibration.temporal.disturbance import UNSEEN, worth
from tenuto.calibration.temporal.maintenance import with_time_only
from tenuto.calibration.temporal.selection import Option, Table, hull, of_tables, selected
from tenuto.calibration.temporal.time_path import time_path
from tenuto.errors import ArtifactError, Cancelled, SchemeError
from tenuto.numerics import Curves, half
from tenuto.runtime.temporal_table import TemporalTable


def made(model: Any, trajectory: Any, choice: str, **options: Any) -> Artifact:
    recipe = recipe_for(schemes.W4A8, with_time_only(model, describe(model), trajectory))
    return quantize(model, recipe, trajectory, temporal=choice, measure=False, **options)


def path_of(model: Any, trajectory: Any) -> Any:
    names = with_time_only(model, describe(model), trajectory).temporal
    return time_path(model, names, trajectory, "cpu")


# --- the knapsack ---------------------------------------------------------------------------------


def test_a_selection_is_within_its_budget_and_near_the_best() -> None:
    draw = torch.Generator().manual_seed(0)
    options = {}
    for name in "abc":
        sizes = torch.randint(1, 40, (5,), generator=draw).tolist()
        effects = torch.rand(5, generator=draw).tolist()
        options[name] = [Option("table", n, e) for n, e in zip(sizes, effects, strict=True)]
    smallest = sum(hull(some)[0].nbytes for some in options.values())
    for budget in range(smallest, 100, 7):
        found = selected(options, budget)
        assert sum(o.nbytes for o in found.values()) <= budget
        every = [
            sum(o.effect for o in some)
            for some in itertools.product(*options.values())
            if sum(o.nbytes for o in some) <= budget
        ]
        step = max(a.effect - b.effect for some in options.values()
                   for a, b in itertools.pairwise(hull(some)) or [(some[0], some[0])])  # fmt: skip
        assert min(every) <= sum(o.effect for o in found.values()) <= min(every) + step
    assert selected(options, 0) == {name: hull(some)[0] for name, some in options.items()}


def test_what_is_larger_and_no_nearer_is_never_taken() -> None:
    some = [Option("tiar", 10, 1.0), Option("table", 8, 0.5), Option("float", 30, 0.0)]
    assert [o.kind for o in hull(some)] == ["table", "float"]
    assert selected({"m": some}, 29)["m"].kind == "table"
    assert selected({"m": some}, 30)["m"].kind == "float"


def test_a_table_has_fewer_curves_where_errors_cost_less() -> None:
    rows = torch.linspace(0, 3, 16)[:, None].mul(torch.arange(1, 65)).sin()
    cheap, dear = (Table.of(rows, w * torch.ones(16).double()) for w in (1.0, 100.0))
    options = {"cheap": of_tables([cheap]), "dear": of_tables([dear])}
    found = selected(options, rows.numel() * 2)
    assert 0 < found["cheap"].curves[0] < (found["dear"].curves[0] or 99)
    kept = cheap.kept(found["cheap"].curves[0])
    assert isinstance(kept, Curves) and kept.nbytes == found["cheap"].nbytes
    assert torch.equal(cheap.kept(0), half(rows))


@pytest.mark.parametrize("budget", [0, -1.0, float("inf"), float("nan"), "all"])
def test_a_budget_that_is_none_is_said(budget: Any, tiny: Any, recorded: Any) -> None:
    with pytest.raises(SchemeError, match="table budget"):
        quantize(tiny("dit"), "w8a8", recorded("dit"), temporal="select", table_budget=budget)
    with pytest.raises(SchemeError, match="for the temporal choice select"):
        quantize(tiny("dit"), "w8a8", recorded("dit"), temporal="table", table_budget=0.5)


# --- what a feature is worth ----------------------------------------------------------------------


def test_worth_foretells_what_an_error_does_to_the_output(tiny: Any, recorded: Any) -> None:
    """Of another error than the one that it was measured with, in each step's own call."""
    model, trajectory = tiny("pixart"), recorded("pixart")
    path = path_of(model, trajectory)
    found, before = worth(model, path, trajectory, "cpu"), set(dict(model.named_modules()))
    assert set(dict(model.named_modules())) == before
    module, name = model.adaln_single, path.names[0]
    for call in trajectory.calls[:4]:
        draw = torch.Generator().manual_seed(9)
        errors = [0.02 * torch.randn(t.shape[1:], generator=draw) for t in path.features[name]]

        def off(_: Any, args: Any, out: Any, errors: Any = errors) -> Any:
            return tuple(t + e for t, e in zip(out, errors, strict=True))

        with torch.no_grad():
            plain = model(**call.inputs)[0]
            hook = module.register_forward_hook(off)
            change = model(**call.inputs)[0] - plain
            hook.remove()
        told = sum(float(w[call.row] * e.square().sum()) for w, e in
                   zip(found[name], errors, strict=True))  # fmt: skip
        real = float(change.square().sum()) / len(change)
        assert told / 4 < real < told * 4


def test_what_only_tables_see_is_worth_little_and_not_nothing(tiny: Any, recorded: Any) -> None:
    model, trajectory = tiny("unet"), recorded("unet", steps=2)
    path = path_of(model, trajectory)
    found = worth(model, path, trajectory, "cpu")
    seen = worth(model, path, trajectory, "cpu", computing=path.names)
    (lone,), (felt,) = found["time_embedding"], seen["time_embedding"]
    torch.testing.assert_close(lone, UNSEEN * felt, rtol=0.05, atol=0)
    assert float(lone.min()) > 0
    other = path.names[3]
    torch.testing.assert_close(found[other][0], seen[other][0], rtol=0.05, atol=0)


# --- artifacts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["int8", "select"])
def test_a_file_of_curves_says_1_4_and_attaches_as_rows(
    kind: str, choice: str, tiny: Any, recorded: Any, tmp_path: Path
) -> None:
    model, trajectory = tiny(kind), recorded(kind)
    artifact = made(model, trajectory, choice)
    artifact.save(tmp_path / "a")
    loaded = Artifact.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    modules = loaded.header["temporal"]["modules"]
    coded = [k for k, t in loaded.tensors.items() if t.dtype is torch.int8 and "temporal/" in k]
    assert (loaded.header["format_version"] == "1.4") == bool(coded)
    if choice == "int8":
        assert coded and {f["kind"] for f in modules.values()} == {"table"}
    full = localized(loaded, model)
    with torch.no_grad(), attach(model, loaded):
        tables = {n: m for n, m in model.named_modules() if isinstance(m, TemporalTable)}
        for call in trajectory.calls:
            assert torch.isfinite(model(**call.inputs)[0]).all()
    assert tables.keys() == {n for n, f in modules.items() if f["kind"] == "table"}
    for name, table in tables.items():
        for number, rows in enumerate(table.rows()):
            assert rows.dtype is torch.float16
            key = f"temporal/{name}.{number}"
            torch.testing.assert_close(rows, full.tensors[key])
            if key in coded:
                wanted = half(Curves.from_tensors(loaded.tensors, key).rows())
                torch.testing.assert_close(rows, wanted)


def test_a_budget_is_kept_and_more_bytes_are_nearer(tiny: Any, recorded: Any) -> None:
    model, trajectory = tiny("pixart"), recorded("pixart", steps=8)
    last = None
    for budget in (0.4, 0.8, 2.0):
        facts = made(model, trajectory, "select", table_budget=budget).header["temporal"]
        about = facts["modules"]["adaln_single"]
        full = 2 * 8 * sum(n for (n,) in about["outputs"])
        assert about["considered"]["table"]["bytes"] == full
        assert about["bytes"] <= budget * full and facts["budget"] == budget
        assert last is None or about["effect"] < last
        last = about["effect"]
    assert last == about["considered"]["table"]["effect"] and "curves" not in about


@pytest.mark.parametrize("kind", ["float", "tiar"])
def test_with_many_steps_a_module_may_compute(
    kind: str, tiny: Any, recorded: Any, monkeypatch: Any
) -> None:
    """With more steps than its weights have columns its table is larger than it is itself."""
    from tenuto.calibration.temporal import select_unit

    model, trajectory = tiny("home"), recorded("home", steps=60)
    if kind == "tiar":

        def forced(options: Any, budget: float) -> Any:
            return {n: next(o for o in some if o.kind == kind) for n, some in options.items()}

        monkeypatch.setattr(select_unit, "selected", forced)
    artifact = made(model, trajectory, "select", table_budget=0.9)
    facts = artifact.header["temporal"]["modules"]["step"]
    assert facts["kind"] == kind and facts["considered"].keys() == {"tiar", "table", "float"}
    inside = [n for n in artifact.header["layers"] if f"{n}.".startswith("step.")]
    assert bool(inside) == (kind == "tiar") and not artifact.section("temporal")
    assert facts["worst"] < (1e-12 if kind == "float" else 0.1)
    with torch.no_grad(), attach(model, artifact):
        for call in trajectory.calls[:3]:
            assert torch.isfinite(model(**call.inputs)[0]).all()


def test_stopped_it_ends_in_the_same_bytes(tiny: Any, recorded: Any, tmp_path: Path) -> None:
    model, trajectory = tiny("pixart"), recorded("pixart")

    def stop(done: int, total: int, note: str) -> None:
        if note.startswith("outside"):
            raise Cancelled

    made(model, trajectory, "select").save(tmp_path / "whole")
    with pytest.raises(Cancelled):
        made(model, trajectory, "select", work=tmp_path / "w", on_progress=stop)
    made(model, trajectory, "select", work=tmp_path / "w").save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("damage", ["scale", "mix", "none", "many", "zero", "steps"])
def test_damaged_curves_are_refused(damage: str, tiny: Any, recorded: Any) -> None:
    model = tiny("pixart")
    artifact = made(model, recorded("pixart"), "int8")
    key = "temporal/adaln_single.0"
    if damage in ("scale", "mix"):
        del artifact.tensors[f"{key}.{damage}"]
    elif damage == "none":
        for end in ("", ".scale"):
            artifact.tensors[key + end] = artifact.tensors[key + end][:0]
    elif damage == "many":
        artifact.tensors[key] = artifact.tensors[key].repeat(40, 1)
    elif damage == "zero":
        artifact.tensors[f"{key}.scale"] *= 0
    else:
        artifact.tensors[f"{key}.mix"] = artifact.tensors[f"{key}.mix"][1:]
    with pytest.raises(ArtifactError):
        attach(model, artifact)
