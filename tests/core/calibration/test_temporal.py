"""Temporal features maintained: the time path as a block, its table, and what is best where."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import Artifact, CacheSchedule, attach, describe, quantize, record, schemes
from tenuto.artifact.summary import about
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.calibration.algorithms.tiar import Tiar, flipped
from tenuto.calibration.presets import recipe_for
from tenuto.calibration.temporal.maintenance import Maintenance, per_step, with_time_only
from tenuto.calibration.temporal.time_path import TimePath, time_path
from tenuto.errors import ArtifactError, Cancelled, SchemeError
from tenuto.model.backbone import layers
from tenuto.numerics.scheme import Recipe, Rule, Scheme
from tenuto.runtime.attachment import quantized
from tenuto.runtime.temporal_table import TemporalTable
from tenuto.sampling.clock import Clock

FAST = Tiar(iterations=20, batch=16)


def names(model: nn.Module, trajectory: Any) -> tuple[str, ...]:
    return with_time_only(model, describe(model), trajectory).temporal


def nearest(model: nn.Module, trajectory: Any, scheme: Scheme = schemes.W4A8) -> Recipe:
    """The default recipe, rounded to nearest."""
    return recipe_for(scheme, with_time_only(model, describe(model), trajectory))


@pytest.fixture(scope="module")
def made(tiny: Any, recorded: Any) -> Any:
    """made(kind, choice, scheme): an artifact, rounded to nearest but for TIAR; made once."""
    known: dict[Any, Artifact] = {}

    def build(kind: str, choice: str, scheme: Scheme = schemes.W4A8) -> Artifact:
        key = (kind, choice, scheme.name)
        if key not in known:
            model, trajectory = tiny(kind), recorded(kind)
            recipe = nearest(model, trajectory, scheme)
            known[key] = quantize(model, recipe, trajectory, temporal=choice)
        return copy.deepcopy(known[key])

    return build


@torch.no_grad()
def features(model: nn.Module, wanted: tuple[str, ...], call: Any) -> dict[str, list[Tensor]]:
    """The outputs of modules in one call, float64."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            parts = [out] if isinstance(out, Tensor) else list(out)
            found.setdefault(name, [t.double() for t in parts])

        return hook

    hooks = [model.get_submodule(n).register_forward_hook(keep(n)) for n in wanted]
    model(**call.inputs)
    for hook in hooks:
        hook.remove()
    return found


def cosine_error(one: list[Tensor], other: list[Tensor]) -> float:
    x, y = (torch.cat([t[0].flatten() for t in f]) for f in (one, other))
    return 1 - float(torch.nn.functional.cosine_similarity(x, y, dim=0, eps=1e-30))


# --- the path as a block --------------------------------------------------------------------------


def test_the_path_gives_the_features_of_the_model(tiny: Any, kind: str, recorded: Any) -> None:
    """Step by step what the modules answer inside the model, several steps in one batch too."""
    model, trajectory = tiny(kind), recorded(kind)
    wanted = names(model, trajectory)
    path = time_path(model, wanted, trajectory, "cpu")
    assert set(path.names) == set(wanted) and len(path.bank) == 4
    for call in trajectory.calls[:4]:
        for name, parts in features(model, wanted, call).items():
            for rows, part in zip(path.features[name], parts, strict=True):
                assert torch.equal(rows[call.row].double(), part[0])
    args, kwargs = path.bank.rows(torch.arange(4), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(path(*args, **kwargs), path.target(), rtol=1e-4, atol=1e-5)
    widths = [t.flatten(1).shape[1] for n in path.names for t in path.features[n]]
    assert path.target().shape == (4, sum(widths))


def test_embedding_layers_are_linked_to_the_time_embedding(tiny: Any, recorded: Any) -> None:
    """An error of the one is felt in the others, as in the model."""
    path = time_path(tiny("unet"), names(tiny("unet"), recorded("unet")), recorded("unet"), "cpu")
    assert path.names[0] == "time_embedding" and set(path.links) == set(range(1, len(path.names)))
    args, kwargs = path.bank.rows(torch.arange(4), "cpu")
    with torch.no_grad():
        before = path.run(*args, **kwargs)
        path.get_submodule(path.local("time_embedding.linear_2")).bias.add_(0.5)  # type: ignore
        after = path.run(*args, **kwargs)
    assert all(not torch.equal(a[0], b[0]) for a, b in zip(before, after, strict=True))
    assert path.owner("time_embedding.linear_1") == "time_embedding"
    with pytest.raises(KeyError):
        path.owner("conv_in")


def test_what_is_no_feature_is_left_out(tiny: Any, recorded: Any, caplog: Any) -> None:
    """A family could be wrong of a model: rows that differ in one call are seen."""
    path = time_path(tiny("dit"), ("pos_embed", "proj_out_1"), recorded("dit"), "cpu")
    assert path.names == ()
    assert caplog.text.count("not maintained") == 2


# --- TIAR and FSC ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [schemes.W4A8, schemes.W4A16], ids=lambda s: s.name)
def test_tiar_beats_rounding_apart(kind: str, made: Any, scheme: Scheme) -> None:
    none, tiar = (made(kind, c, scheme).header["temporal"]["modules"] for c in ("none", "tiar"))
    assert none.keys() == tiar.keys() and none
    means = [sum(f["mean"] for f in facts.values()) for facts in (none, tiar)]
    assert means[1] < means[0] / 2
    assert all(f["kind"] == "none" for f in none.values())
    assert all(f["kind"] == "tiar" for f in tiar.values())


def test_many_weights_and_few_steps_are_told_apart_by_a_decade(loop: Any) -> None:
    """With more weights a row than steps, as real models have, their roundings cancel out."""
    from diffusers import PixArtTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PixArtTransformer2DModel(
            num_attention_heads=6, attention_head_dim=32, in_channels=4, out_channels=4,
            num_layers=1, cross_attention_dim=192, sample_size=8, patch_size=2,
            caption_channels=24, use_additional_conditions=False,
        ).eval()  # fmt: skip
    trajectory = record(model, sample=loop("pixart", steps=6), batch=1, runs=1)
    rules = Recipe((Rule("adaln_single.*", schemes.W4A8, RoundToNearest()),))
    found = {
        choice: quantize(model, rules, trajectory, temporal=choice).header["temporal"]["modules"]
        for choice in ("none", "tiar", "table")
    }
    errors = {choice: facts["adaln_single"]["mean"] for choice, facts in found.items()}
    assert errors["tiar"] < errors["none"] / 10
    assert errors["table"] < 1e-6


def test_flips_lower_the_error_row_by_row() -> None:
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(8, 24, generator=draw), torch.randn(5, 24, generator=draw).double()
    form = schemes.W4A16.weight
    start = RoundToNearest().weight(w, form)
    gram, cross = x.t() @ x, (x @ w.double().t()).t() @ x

    def errors(q: Any) -> Tensor:
        return ((q.dequantize().double() - w.double()) @ x.t()).square().sum(1)

    last = errors(start)
    for most in (1, 3, 100):
        now = errors(flipped(w, form, start, gram, cross, most))
        assert (now <= last + 1e-9).all()
        last = now
    assert float(last.sum()) < 0.2 * float(errors(start).sum())
    again = flipped(w, form, start, gram, cross, 0)
    assert torch.equal(again.codes(), start.codes()) and torch.equal(again.qdata, start.qdata)


def test_one_range_a_step(tiny: Any, kind: str, made: Any, recorded: Any) -> None:
    """FSC: of the inputs with quantized weights, min to max, whatever the rest's scheme."""
    artifact, trajectory = made(kind, "tiar"), recorded(kind)
    facts, ranges = artifact.header["layers"], artifact.section("ranges")
    inside = [n for n, f in facts.items() if f["scheme"] == "w4a8-static"]
    model = tiny(kind)
    modules = names(model, trajectory)
    assert set(inside) == {
        n for n, _ in layers(model) if any(f"{n}.".startswith(f"{m}.") for m in modules)
    }
    assert {k.rsplit(".", 1)[0] for k in ranges} == set(inside)
    assert all(ranges[f"{n}.scale"].shape == (4,) for n in inside)
    form = artifact.header["schemes"]["w4a8-static"]["activation"]
    assert form["per_step"] and form["granularity"] == "tensor" and form["bits"] == 8
    with quantized(model, artifact) as twin, torch.no_grad():
        for name in inside:  # weights alone
            layer: Any = model.get_submodule(name)
            layer.weight.copy_(twin.denoiser.get_submodule(name).weight)  # type: ignore
    low: dict[str, list[Tensor]] = {n: [] for n in inside}
    for n in inside:
        model.get_submodule(n).register_forward_pre_hook(
            lambda m, args, n=n: low[n].append(args[0].amin())
        )
    for call in trajectory.calls[:4]:
        features(model, (), call)
    for n in inside:
        scale, zero = ranges[f"{n}.scale"], ranges[f"{n}.zero_point"]
        calls = len(low[n]) // 4  # some modules are called twice in a call
        seen = torch.stack(low[n][::calls]).clamp_max(0)
        assert ((-zero * scale - seen).abs() <= scale * 0.51 + 1e-5).all(), n


def test_tiar_is_for_all_layers_and_before_the_blocks(
    tiny: Any, recorded: Any, tmp_path: Path
) -> None:
    """A unit of its own, the first; the embedding layers are in no block's reconstruction."""
    model, trajectory, order = tiny("unet"), recorded("unet", steps=2), list[str]()

    def watch(done: int, total: int, note: str) -> None:
        unit = note.split()[0]
        if unit not in order:
            order.append(unit)

    block = "down_blocks.0.resnets.0"
    rules = tuple(
        Rule(p, schemes.W4A8, replace(FAST, iterations=2)) for p in (f"{block}.*", "time_emb*")
    )
    quantize(model, Recipe(rules), trajectory, temporal="tiar", on_progress=watch,
             work=tmp_path / "w")  # fmt: skip
    assert order[:2] == ["temporal", block]
    from safetensors.torch import load_file

    units = {p.stem: load_file(p) for p in (tmp_path / "w").glob("*.safetensors")}
    assert f"{block}.time_emb_proj.qdata" in units["temporal"]
    assert f"{block}.time_emb_proj.qdata" not in units[block]
    assert f"{block}.conv1.qdata" in units[block]


def test_blocks_see_the_features_that_are_final(tiny: Any, recorded: Any, monkeypatch: Any) -> None:
    """Inputs of reconstruction come from the quantized time path, targets from the plain one."""
    from tenuto.calibration.chain import Chain

    model, trajectory, seen = tiny("pixart"), recorded("pixart"), list[tuple[Any, Any]]()
    original = Chain.data

    def look(self: Any, block: str) -> Any:
        parts = [m.adaln_single.linear.weight.clone() for m in (self.model, self.reference)]
        seen.append((parts[0], parts[1]))
        return original(self, block)

    monkeypatch.setattr(Chain, "data", look)
    recipe = recipe_for(schemes.W4A8, describe(model), replace(FAST, iterations=1))
    artifact = quantize(model, recipe, trajectory, temporal="tiar")
    with quantized(model, artifact) as twin:
        final = twin.denoiser.get_submodule("adaln_single.linear").weight
    assert seen
    for student, teacher in seen:
        torch.testing.assert_close(student, final)
        assert torch.equal(teacher, model.adaln_single.linear.weight)


# --- what the header says -------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["none", "tiar", "table", "auto"])
def test_the_errors_are_those_of_the_attached_model(
    tiny: Any, kind: str, made: Any, recorded: Any, choice: str
) -> None:
    """The cosine of every module's features inside the model, at every step."""
    model, trajectory, artifact = tiny(kind), recorded(kind), made(kind, choice)
    facts = artifact.header["temporal"]
    assert json.loads(json.dumps(facts)) == facts and facts["choice"] == choice
    wanted = names(model, trajectory)
    assert facts["modules"].keys() == set(wanted)
    plain = [features(model, wanted, call) for call in trajectory.calls[:4]]
    with attach(model, artifact, simulate=True):
        found = [features(model, wanted, call) for call in trajectory.calls[:4]]
    for name, said in facts["modules"].items():
        errors = [cosine_error(f[name], p[name]) for f, p in zip(found, plain, strict=True)]
        assert len(said["cosine_error"]) == 4
        assert said["cosine_error"] == pytest.approx(errors, rel=0.05, abs=1e-9)
        assert said["mean"] == pytest.approx(sum(errors) / 4, rel=0.05, abs=1e-9)
        assert said["worst"] == max(said["cosine_error"])


def test_auto_takes_the_smaller_error(tiny: Any, recorded: Any, monkeypatch: Any) -> None:
    """Module by module; here the table of one of them is made bad. A tie is the table's."""
    model, trajectory = tiny("unet"), recorded("unet", steps=2)
    original, bad = TimePath.errors, "time_embedding"

    def errors(self: Any, weights: Any, ranges: Any, tables: Any) -> Any:
        found = original(self, weights, ranges, tables)
        tie = "mid_block.resnets.0.time_emb_proj"
        return found | ({bad: found[bad] + 1} if bad in tables else {}) | {tie: 0 * found[tie]}

    recipe = nearest(model, trajectory, schemes.W8A8)
    plain = quantize(model, recipe, trajectory).header["temporal"]
    assert plain["choice"] == "auto", "it is the default"
    assert {f["kind"] for f in plain["modules"].values()} == {"table"}
    monkeypatch.setattr(TimePath, "errors", errors)
    artifact = quantize(model, recipe, trajectory, temporal="auto")
    kinds = {n: f["kind"] for n, f in artifact.header["temporal"]["modules"].items()}
    assert [n for n, k in kinds.items() if k == "tiar"] == [bad]
    tried = {n: set(f["considered"]) for n, f in artifact.header["temporal"]["modules"].items()}
    assert tried.pop(bad) == {"tiar", "table"}
    assert all(kinds == {"table"} for kinds in tried.values()), "what is near is not reconstructed"
    assert "rounding" not in plain and "rounding" in artifact.header["temporal"]
    facts = artifact.header["layers"]
    assert facts["time_embedding.linear_1"]["scheme"] == "w8a8-static"
    assert not [n for n in facts if n.endswith("time_emb_proj")]
    monkeypatch.undo()
    assert_works(model, artifact, trajectory)


def assert_works(model: nn.Module, artifact: Artifact, trajectory: Any) -> None:
    with torch.no_grad():
        plain = [model(**c.inputs)[0] for c in trajectory.calls]
        with attach(model, artifact):
            found = [model(**c.inputs)[0] for c in trajectory.calls]
    for a, b in zip(plain, found, strict=True):
        assert float((a - b).norm() / a.norm()) < 0.2


def test_none_is_the_scheme_like_all_the_rest(kind: str, made: Any, tiny: Any) -> None:
    """A fair baseline: 4 bits, to nearest, one range a token."""
    artifact = made(kind, "none")
    modules = artifact.header["temporal"]["modules"]
    inside = {n: f for n, f in artifact.header["layers"].items()
              if any(f"{n}.".startswith(f"{m}.") for m in modules)}  # fmt: skip
    assert inside and {f["scheme"] for f in inside.values()} == {"w4a8"}
    assert not artifact.section("temporal") and not artifact.section("ranges")
    weights = artifact.section("weights")
    for name in inside:
        layer: Any = tiny(kind).get_submodule(name)
        q = RoundToNearest().weight(layer.weight, schemes.W4A8.weight)
        assert torch.equal(weights[f"{name}.qdata"], q.qdata)


def test_inspect_shows_a_line_a_kind(made: Any) -> None:
    for choice, kind in (("none", "none"), ("tiar", "tiar"), ("auto", "table")):
        text = about("a.safetensors", made("unet", choice), 1)
        (line,) = [line for line in text.splitlines() if "1 - cosine" in line]
        assert f"{kind}: 9 modules" in line and text.count("\ntemporal") == 1
        facts = made("unet", choice).header["temporal"]["modules"].values()
        assert f"{max(f['worst'] for f in facts):.1e} worst" in line


def test_a_wrong_choice_is_said(tiny: Any, recorded: Any) -> None:
    with pytest.raises(SchemeError, match="none, tiar, table, int8, select, auto"):
        quantize(tiny("dit"), schemes.W8A8, recorded("dit"), temporal="half")


def test_per_step_schemes() -> None:
    assert per_step(schemes.W4A8) == schemes.W4A8_STATIC == per_step(schemes.W4A8_STATIC)
    assert per_step(schemes.W8A8) == schemes.W8A8_STATIC
    assert per_step(schemes.W4A16) is schemes.W4A16


# --- the table ------------------------------------------------------------------------------------


def test_the_table_is_the_features_in_fp16(tiny: Any, kind: str, made: Any, recorded: Any) -> None:
    model, trajectory, artifact = tiny(kind), recorded(kind), made(kind, "table")
    wanted = names(model, trajectory)
    values = artifact.section("temporal")
    assert all(v.dtype is torch.float16 and len(v) == 4 for v in values.values())
    for call in trajectory.calls[:4]:
        for name, parts in features(model, wanted, call).items():
            for number, part in enumerate(parts):
                row = values[f"{name}.{number}"][call.row]
                assert torch.equal(row, part[0].half())
    with attach(model, artifact) as attached:
        tables = [m for m in model.modules() if isinstance(m, TemporalTable)]
        assert len(tables) == len(wanted)
        assert not [n for n, p in model.named_parameters() if n.startswith(wanted) and p.numel()]
        for call in trajectory.calls[:4]:
            for name, parts in features(model, wanted, call).items():
                for number, part in enumerate(parts):
                    stored = values[f"{name}.{number}"][call.row].double()
                    assert torch.equal(part, stored.expand_as(part))
        assert attached.int8_weight_share() == 1.0, "what is out is not counted"


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_batch(tiny: Any, kind: str, made: Any, call_as: Any, conditions: Any, batch: int)\
        -> None:  # fmt: skip
    """At calibrated steps: row by row the same in every batch, shapes as the original's."""
    model, artifact = tiny(kind), made(kind, "table", schemes.W8A16)
    given = conditions(kind, [1, 2, 3][:batch])
    x = torch.randn(3, 4 if kind in ("pixart", "unet") else 3, 8, 8,
                    generator=torch.Generator().manual_seed(1))[:batch]  # fmt: skip
    with torch.no_grad():
        plain = call_as(kind, model, x, torch.tensor(500), given)
        with attach(model, artifact):
            found = call_as(kind, model, x, torch.tensor(500), given)
    assert found.shape == plain.shape
    assert float((found - plain).norm() / plain.norm()) < 0.05


@pytest.mark.parametrize("choice", ["table", "auto"])
def test_any_number_of_steps(
    tiny: Any, kind: str, made: Any, call_as: Any, conditions: Any, loop: Any, choice: str
) -> None:
    """Off the table the original computes, bit by bit; on it the table does, again and again."""
    model, artifact = tiny(kind), made(kind, choice)
    for name in list(artifact.header["layers"]):  # the table alone
        del artifact.header["layers"][name]
    given, x = conditions(kind, [1]), loop(kind).noise(1, 1)
    with torch.no_grad():
        wanted = {
            t: call_as(kind, model, x, torch.tensor(t), given) for t in (999, 998, 600, 500, 3)
        }
        with attach(model, artifact) as attached:
            assert attached.execution()["mode"] == "float"
            for t in (999, 600, 500, 998, 3, 500):
                found = call_as(kind, model, x, torch.tensor(t), given)
                if t in (999, 500):
                    gap = float((found - wanted[t]).norm() / wanted[t].norm())
                    assert 0 < gap < 2e-3
                else:
                    assert torch.equal(found, wanted[t]), t
        for steps in (3, 7):
            plain = loop(kind, steps=steps)(model, 1, 2)
            with attach(model, artifact):
                assert (loop(kind, steps=steps)(model, 1, 2) - plain).abs().max() < 0.02


def test_rows_at_different_timesteps_compute(tiny: Any, made: Any) -> None:
    """The table has one row for a call: a batch of several timesteps gets what is right."""
    model, artifact = tiny("pixart"), made("pixart", "table")
    artifact.header["layers"] = {}
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    given = {"encoder_hidden_states": text, "timestep": torch.tensor([999, 500])}
    with torch.no_grad():
        plain = model(x, **given).sample
        with attach(model, artifact):
            assert torch.equal(model(x, **given).sample, plain)


def test_off_is_off_and_released(tiny: Any, kind: str, made: Any, bits: Any, loop: Any) -> None:
    model = tiny(kind)
    before = bits(model)
    with attach(model, made(kind, "auto")), torch.no_grad():
        loop(kind, steps=3)(model, 0, 1)
    assert bits(model) == before
    attached = attach(model, made(kind, "table"))
    attached.release()
    with torch.no_grad():
        assert torch.isfinite(loop(kind, steps=3)(model, 0, 1)).all(), "the nearest row"
    tables = [m for m in model.modules() if isinstance(m, TemporalTable)]
    assert tables and not any(t._original for t in tables)


def test_moved_and_cast(tiny: Any, made: Any, loop: Any) -> None:
    """A cast does not round the table; the original that computes off it follows."""
    model, artifact = tiny("pixart"), made("pixart", "table")
    x, text = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 5, 24).double()
    attached = attach(model, artifact)
    stored = model.adaln_single.rows()[0].clone()
    model.to(torch.bfloat16).to(torch.float64)
    assert torch.equal(model.adaln_single.rows()[0], stored)
    assert model.adaln_single.rows()[0].dtype is torch.float16
    for t in (999, 123):
        with torch.no_grad():
            out = model(x, encoder_hidden_states=text, timestep=torch.tensor([t])).sample
        assert out.dtype is torch.float64
    attached.detach()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_save_and_load(tiny: Any, kind: str, made: Any, tmp_path: Path, loop: Any) -> None:
    artifact, model = made(kind, "auto"), tiny(kind)
    artifact.save(tmp_path / "a.safetensors")
    again = Artifact.load(tmp_path / "a.safetensors")
    assert again.header == artifact.header
    assert all(torch.equal(v, artifact.tensors[k]) for k, v in again.tensors.items())
    outs = []
    for one in (artifact, again):
        with quantized(model, one) as twin, torch.no_grad():
            outs.append(loop(kind)(twin.denoiser, 3, 2))
            copied = copy.deepcopy(twin.denoiser)
            assert torch.equal(loop(kind)(copied, 3, 2), outs[-1])
    assert torch.equal(*outs)


def test_a_route_on_top(tiny: Any, kind: str, made: Any, loop: Any, bits: Any) -> None:
    """The table first, then leaves, then the route; both do what they do."""
    model, artifact = tiny(kind), made(kind, "table")
    branches = [b.name for b in describe(model).branches]
    times = tuple(artifact.header["schedule"]["timesteps"])
    schedule = CacheSchedule.steps((True, False, True, False), times, branches)
    route = Artifact.new(model, artifact.header["schedule"])
    route.header["route"] = {"timesteps": list(times), "branches": branches}
    route.tensors["route/table"] = schedule.table
    both = artifact | route
    assert both.section("temporal").keys() == artifact.section("temporal").keys()
    assert both.header["temporal"] == artifact.header["temporal"]
    before = bits(model)
    with torch.no_grad(), attach(model, both) as attached:
        assert torch.isfinite(loop(kind)(model, 1, 2)).all()
        assert all(held > 0 for _, held in attached.counts().values())
        assert [m for m in model.modules() if isinstance(m, TemporalTable)]
    assert bits(model) == before


def test_another_quantization_replaces_it_whole(made: Any) -> None:
    """The table belongs to the weights beside it: merged, they come and go together."""
    table, none = made("dit", "table"), made("dit", "none")
    merged = table | none
    assert not merged.section("temporal") and merged.header["temporal"]["choice"] == "none"
    assert merged.tensors.keys() == none.tensors.keys()
    merged = none | table
    assert merged.tensors.keys() == table.tensors.keys()
    old = made("dit", "none")
    del old.header["temporal"]
    assert "temporal" not in (table | old).header
    merged.validate()


@pytest.mark.parametrize("damage", ["gone", "rows", "type", "layer", "shape", "empty"])
def test_a_damaged_table_is_refused(made: Any, tiny: Any, bits: Any, damage: str) -> None:
    artifact, model = made("pixart", "table"), tiny("pixart")
    key, facts = "temporal/adaln_single.0", artifact.header["temporal"]["modules"]["adaln_single"]
    if damage == "gone":
        del artifact.tensors[key]
    elif damage == "rows":
        artifact.tensors[key] = artifact.tensors[key][:2]
    elif damage == "type":
        artifact.tensors[key] = artifact.tensors[key].to(torch.int8)
    elif damage == "layer":
        layer = "adaln_single.linear"
        none = made("pixart", "none")
        artifact.header["layers"][layer] = none.header["layers"][layer]
        artifact.tensors |= {k: v for k, v in none.tensors.items() if f"/{layer}." in k}
    else:
        facts["outputs"] = 3 if damage == "shape" else []
    before = bits(model)
    with pytest.raises(ArtifactError):
        attach(model, artifact)
    assert bits(model) == before


def test_a_module_that_is_not_there_is_refused(made: Any, tiny: Any, bits: Any) -> None:
    artifact, model = made("pixart", "table"), tiny("pixart")
    modules = artifact.header["temporal"]["modules"]
    modules["nowhere"] = modules.pop("adaln_single")
    for number in (0, 1):
        value = artifact.tensors.pop(f"temporal/adaln_single.{number}")
        artifact.tensors[f"temporal/nowhere.{number}"] = value
    before = bits(model)
    with pytest.raises(ArtifactError, match="nowhere"):
        attach(model, artifact)
    assert bits(model) == before


def test_compiled_it_follows_the_clock() -> None:
    """One graph for the table at whatever step, one for the original off it."""
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounter

    reset()
    counter, clock, module = CompileCounter(), Clock((999.0, 500.0, 1.0)), nn.Linear(4, 6)
    table = TemporalTable(module, [torch.randn(3, 6).half()], True, clock)
    compiled, x = torch.compile(table, backend=counter, fullgraph=True), torch.ones(2, 4)
    with torch.no_grad():
        for row, timestep in enumerate((999, 500, 1)):
            clock.tick(timestep, (0,))
            assert torch.equal(compiled(x), table.rows()[0][row].float().expand(2, 6))
            table(x).add_(1)  # the caller's own, as the module's would be
        assert counter.frame_count == 1
        for timestep in (700, 300):
            clock.tick(timestep, (0,))
            assert torch.equal(compiled(x), module(x))
        assert counter.frame_count == 2
    reset()


def test_values_beyond_half_precision_stay_as_they_are(tiny: Any, recorded: Any) -> None:
    model = tiny("pixart")
    with torch.no_grad():
        model.adaln_single.linear.bias[0] = 1e5
    artifact = quantize(model, nearest(model, recorded("pixart")), recorded("pixart"),
                        temporal="table")  # fmt: skip
    values = artifact.section("temporal")
    assert values["adaln_single.0"].dtype is torch.float32
    assert values["adaln_single.1"].dtype is torch.float16
    artifact.validate()


# --- the clock ------------------------------------------------------------------------------------


def test_the_clock_knows_calibrated_timesteps() -> None:
    clock = Clock((999.0, 500.0, 1.0))
    assert not clock.exact
    for timestep, exact in ((999, True), (999.4, True), (998, False), (500.49, True), (2, False)):
        clock.tick(timestep, (0,))
        assert clock.exact == exact, timestep
    flow = Clock((1.0, 0.7, 0.1))
    for timestep, exact in ((0.7, True), (0.7004, True), (0.702, False)):
        flow.observe(torch.tensor([timestep]), 1, [], "cpu")
        assert flow.exact == exact, timestep
    prompt = torch.ones(2, 3)
    for conditions in ([], [prompt]):
        clock.observe(torch.tensor([500, 999]), 2, conditions, "cpu")
        assert not clock.exact and clock.step == 1
        clock.observe(torch.tensor([500, 500]), 2, conditions, "cpu")
        assert clock.exact
        clock.observe(torch.tensor(500).expand(2), 2, conditions, "cpu")
        assert clock.exact
    empty = Clock(())
    empty.tick(3, (0,))
    assert not empty.exact


# --- long work ------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["tiar", "table", "auto"])
def test_the_unit_is_kept(tiny: Any, recorded: Any, tmp_path: Path, choice: str) -> None:
    """Stopped after it, it is not done again, and the bytes are those of an undisturbed run."""
    model, trajectory = tiny("unet"), recorded("unet", steps=2)
    recipe = nearest(model, trajectory)

    def stop(done: int, total: int, note: str) -> None:
        if note.startswith("outside"):
            raise Cancelled

    quantize(model, recipe, trajectory, temporal=choice).save(tmp_path / "whole")
    options: dict[str, Any] = {"temporal": choice, "work": tmp_path / "w"}
    with pytest.raises(Cancelled):
        quantize(model, recipe, trajectory, on_progress=stop, **options)
    assert [p.name for p in (tmp_path / "w").glob("*.safetensors")] == ["temporal.safetensors"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Maintenance, "quantized", None)
        quantize(model, recipe, trajectory, **options).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    other = "tiar" if choice == "table" else "table"
    quantize(model, recipe, trajectory, temporal=other, work=tmp_path / "w").save(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() != (tmp_path / "whole").read_bytes(), "another job"


# --- models that no family knows ------------------------------------------------------------------


def test_discovery_serves_unknown_models(tiny: Any, recorded: Any) -> None:
    """Where it fails, quantization goes on without; where a family speaks, it is not asked."""
    model, trajectory = tiny("home"), recorded("home")
    assert with_time_only(model, describe(model), trajectory).temporal == ("step",)
    broken = replace(trajectory, calls=[replace(trajectory.calls[0], inputs={})])
    assert with_time_only(model, describe(model), broken).temporal == ()
    known = replace(describe(tiny("dit")), temporal=())
    assert with_time_only(tiny("dit"), known, recorded("dit")).temporal == ()


def test_only_what_the_recipe_quantizes_is_maintained(tiny: Any, recorded: Any) -> None:
    model, trajectory = tiny("dit"), recorded("dit")
    rules = (Rule("transformer_blocks.1.norm1.*", schemes.W8A8), Rule("*.ff.*", schemes.W8A8))
    artifact = quantize(model, Recipe(rules), trajectory, temporal="table")
    module = "transformer_blocks.1.norm1.emb.timestep_embedder"
    assert list(artifact.header["temporal"]["modules"]) == [module]
    only = quantize(model, Recipe((Rule(f"{module}.*", schemes.W8A8),)), trajectory)
    assert only.header["layers"] == {} and set(only.section("temporal")) == {f"{module}.0"}
    with attach(model, only) as attached:
        assert attached.int8_weight_share() == 0.0
