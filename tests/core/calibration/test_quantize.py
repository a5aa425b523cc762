"""`quantize`: every scheme on every kind of denoiser, and the contract for long work."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto
from tenuto import Artifact, attach, describe, quantize, record, schemes
from tenuto.calibration.algorithms import Effort
from tenuto.calibration.algorithms.adaround import AdaRound
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.calibration.algorithms.nearest import RoundToNearest
from tenuto.calibration.presets import PRESETS, effort, recipe_for
from tenuto.calibration.quantize import Job
from tenuto.calibration.replay import inputs_of, outputs
from tenuto.errors import Cancelled, SchemeError, TenutoError
from tenuto.model.backbone import layers
from tenuto.numerics import fits
from tenuto.numerics.scheme import Recipe, Rule, Scheme, named

NAMED = [s.name for s in vars(schemes).values() if isinstance(s, Scheme)]
BRIEF = AdaRound(iterations=3, batch=4)


def recipe(denoiser: nn.Module, scheme: Scheme, rounding: Any = BRIEF) -> Recipe:
    """The default recipe with little effort."""
    return recipe_for(scheme, describe(denoiser), rounding)


def data(artifact: Artifact, path: Path) -> bytes:
    """The bytes of its file."""
    artifact.save(path / "x.safetensors")
    return (path / "x.safetensors").read_bytes()


def drift(model: nn.Module, artifact: Artifact, calls: Any) -> float:
    """Relative error of the attached model's outputs on recorded calls."""

    def out() -> Tensor:
        with torch.no_grad():
            found = [model(**call.inputs) for call in calls]
        return torch.cat([f if isinstance(f, Tensor) else f[0] for f in found])

    plain = out()
    with attach(model, artifact):
        return float((out() - plain).norm() / plain.norm())


# --- every scheme ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_every_scheme_on_every_kind(
    tiny: Any, kind: str, recorded: Any, name: str, tmp_path: Path
) -> None:
    model, trajectory, scheme = tiny(kind), recorded(kind, steps=2), named(name)
    chosen = recipe(model, scheme, GPTQ(rows=4) if scheme.of_files else BRIEF)
    artifact = quantize(model, chosen, trajectory, temporal="none")
    real = scheme.weight.dtype == "e4m3"  # of convolutions there is no such product
    every = {n: tuple(m.weight.shape) for n, m in layers(model) if m.weight.ndim == 2 or not real}
    if scheme.of_files:  # first, last and time-only layers stay, and odd numbers of columns
        every = {n: s for n, s in every.items() if chosen.rule(n) and fits(s, scheme.weight)}
        assert every
    facts = artifact.header["layers"]
    assert {n: tuple(f["shape"]) for n, f in facts.items()} == every
    artifact.save(tmp_path / "a")
    again = Artifact.load(tmp_path / "a")
    assert again.header == artifact.header
    limit = (0.25 if real else 0.1) if scheme.weight.bits == 8 else 0.7
    assert drift(model, again, trajectory.calls) < limit
    bits = {artifact.header["schemes"][f["scheme"]]["weight"]["bits"] for f in facts.values()}
    ends = set() if scheme.of_files else {8}
    assert bits == {scheme.weight.bits} | ends, "first and last layers have 8"
    static = scheme.activation is not None and not scheme.activation.dynamic
    assert bool(artifact.section("ranges")) == static
    assert artifact.header["schedule"]["timesteps"] == list(trajectory.timesteps)


def test_a_scheme_and_a_preset_are_all_it_takes(tiny: Any, recorded: Any) -> None:
    """GPTQ by default where weights have 4 bits, for the default effort."""
    model = tiny("home")
    artifact = quantize(model, schemes.W4A8, recorded("home"), preset="quick")
    used = {
        row["algorithm"]["name"]: row["algorithm"].get("rows")
        for row in artifact.header["recipe"]
        if row["algorithm"]
    }
    assert used == {"RoundToNearest": None, "GPTQ": PRESETS["quick"].effort.rows}
    assert artifact.header["preset"] == "quick"
    plain = quantize(model, schemes.W8A8, recorded("home"))
    assert {row["algorithm"]["name"] for row in plain.header["recipe"]} == {"RoundToNearest"}


def test_presets_are_ordered_by_effort() -> None:
    found = [effort(name) for name in ("quick", "standard", "thorough")]
    for less, more in pairwise(found):
        assert less.rounding("gptq").rows < more.rounding("gptq").rows
        learnt = (p.rounding("adaround").iterations for p in (less, more))
        assert next(learnt) < next(learnt)
        assert less.prompts <= more.prompts


def test_a_user_says_how_weights_round(tiny: Any, recorded: Any, monkeypatch: Any) -> None:
    """By name; the thorough preset learns it. A recipe says it itself."""
    model = tiny("home")
    brief = {name: replace(kind, effort=Effort(64, 3, 4)) for name, kind in PRESETS.items()}
    monkeypatch.setattr("tenuto.calibration.presets.PRESETS", brief)

    def used(rounding: str | None, preset: str = "quick") -> set[str]:
        artifact = quantize(model, schemes.W4A8, recorded("home"), preset=preset, rounding=rounding)
        return {row["algorithm"]["name"] for row in artifact.header["recipe"] if row["algorithm"]}

    assert used("nearest") == {"RoundToNearest"}
    assert used("adaround") == used(None, "thorough") == {"RoundToNearest", "AdaRound"}
    assert used("gptq", "thorough") == {"RoundToNearest", "GPTQ"}
    with pytest.raises(SchemeError, match="adaround, clip, gptq, nearest"):
        used("best")
    with pytest.raises(SchemeError, match="recipe"):
        quantize(model, recipe(model, schemes.W4A8), recorded("home"), rounding="gptq")


def test_the_recipe_keeps_the_ends(tiny: Any, kind: str) -> None:
    model = tiny(kind)
    backbone = describe(model)
    chosen = recipe(model, schemes.W4A8)
    for name, _ in layers(model):
        rule = chosen.rule(name)
        assert rule is not None and rule.scheme is not None
        inside = backbone.block_of(name) is not None
        time_only = any(name.startswith(t) for t in backbone.temporal)
        if time_only:
            assert rule.scheme is schemes.W4A8 and isinstance(rule.algorithm, RoundToNearest)
        elif rule.scheme.weight.bits == 4:
            assert rule.scheme is schemes.W4A8 and rule.algorithm is BRIEF
        else:
            assert rule.scheme.activation == schemes.W4A8.activation
            assert isinstance(rule.algorithm, RoundToNearest)
            assert not inside or ".norm1." in name
    kept = replace(backbone, keep=("*.attn1.*",))
    for name, _ in layers(model):
        rule = recipe_for(schemes.W8A8, kept).rule(name)
        assert (rule is None) == (".attn1." in name)
    weight_only = recipe_for(schemes.W4A16, backbone)
    assert all(r.scheme is None or r.scheme.activation is None for r in weight_only.rules)


def test_layers_outside_of_blocks_are_reconstructed_too(tiny: Any, recorded: Any) -> None:
    """A U-Net's samplers and projections lie outside; with AdaRound each is a unit of its own."""
    model, trajectory = tiny("unet"), recorded("unet")
    name = "down_blocks.0.downsamplers.0.conv"
    assert describe(model).block_of(name) is None
    errors = []
    for method in (RoundToNearest(), AdaRound(iterations=80, batch=16)):
        artifact = quantize(model, Recipe((Rule(name, schemes.W4A16, method),)), trajectory)
        assert list(artifact.header["layers"]) == [name]
        errors.append(_layer_error(model, name, artifact, trajectory.calls))
    assert errors[1] < 0.95 * errors[0]


def test_everything_by_adaround(tiny: Any, kind: str, recorded: Any) -> None:
    """A user's own recipe: one rule for all, the time path and the ends included."""
    model = tiny(kind)
    rule = Rule("*", schemes.W4A8, BRIEF)
    artifact = quantize(model, Recipe((rule,)), recorded(kind, steps=2), temporal="none")
    assert artifact.header["layers"].keys() == {n for n, _ in layers(model)}


def _layer_error(model: nn.Module, name: str, artifact: Artifact, calls: Any) -> float:
    """Squared error of one layer's output on the inputs of the plain model."""
    bank = inputs_of(model, name, calls, "cpu")
    plain = outputs(model.get_submodule(name), bank, "cpu")
    with attach(model, artifact):
        found = outputs(model.get_submodule(name), bank, "cpu")
    return float((found - plain).square().mean())


# --- what AdaRound is for -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_w4a8_by_adaround_beats_round_to_nearest(tiny: Any, kind: str, recorded: Any) -> None:
    """On each block's error, inputs from the quantized prefix, and the first and last kept at 8."""
    model, trajectory = tiny(kind), recorded(kind)
    errors: list[list[float]] = []
    for rounding in (RoundToNearest(), AdaRound(iterations=60, batch=16)):
        made = quantize(model, recipe(model, schemes.W4A8, rounding), trajectory)
        errors.append(_block_errors(model, made, trajectory.calls))
    better = [b < a for a, b in zip(*errors, strict=True)]
    assert sum(better) >= len(better) - 1, "one may be worse by chance"
    assert sum(errors[1]) < 0.8 * sum(errors[0])


def _block_errors(model: nn.Module, artifact: Artifact, calls: Any) -> list[float]:
    """Relative squared error of every block's output in the attached model, weights alone."""
    found = []
    weights = {n: f["scheme"] for n, f in artifact.header["layers"].items()}
    twin = copy.deepcopy(model)
    with attach(twin, artifact), torch.no_grad():
        for name in weights:
            layer: Any = twin.get_submodule(name)
            model_layer: Any = model.get_submodule(name)
            weights[name] = (model_layer.weight.clone(), layer.weight)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, (_, value) in weights.items():
            changed.get_submodule(name).weight.copy_(value)  # type: ignore[union-attr, operator]
    for block in describe(model).blocks:
        bank, plain = inputs_of(changed, block, calls, "cpu"), inputs_of(model, block, calls, "cpu")
        target = outputs(model.get_submodule(block), plain, "cpu")
        answer = outputs(changed.get_submodule(block), bank, "cpu")
        found.append(float((answer - target).square().mean() / target.square().mean()))
    return found


def test_algorithms_can_be_mixed_in_a_block(tiny: Any, recorded: Any) -> None:
    """Attention to nearest, feed-forward learnt, one block in float, one rule without algorithm."""
    model = tiny("pixart")
    rules = (
        Rule("transformer_blocks.1.*", None),
        Rule("*.ff.*", schemes.W4A8, BRIEF),
        Rule("*.attn1.*", schemes.W8A8),
        Rule("*.attn2.*", schemes.W4A16, RoundToNearest()),
    )
    artifact = quantize(model, Recipe(rules), recorded("pixart"))
    found = artifact.header["layers"]
    assert not [n for n in found if n.startswith("transformer_blocks.1.") or "proj_out" in n]
    assert found["transformer_blocks.2.ff.net.2"]["scheme"] == "w4a8"
    assert found["transformer_blocks.0.attn1.to_q"]["scheme"] == "w8a8"
    assert drift(model, artifact, recorded("pixart").calls) < 0.5


def test_what_cannot_be_quantized_is_said(tiny: Any, recorded: Any) -> None:
    model = tiny("dit")
    with pytest.raises(TenutoError, match="No layer"):
        quantize(model, Recipe((Rule("nothing", schemes.W8A8),)), recorded("dit"))
    with pytest.raises(SchemeError, match="quick"):
        quantize(model, schemes.W8A8, recorded("dit"), preset="fast")


def test_padding_that_no_kernel_knows_stays_float(tiny: Any, loop: Any) -> None:
    """Padding by reflection, or "same": the layer is left out, the rest goes on."""
    for padding in ({"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}):
        model = tiny("home")
        model.stem = nn.Sequential(model.stem, nn.Conv2d(32, 32, 3, **padding))
        trajectory = record(model, sample=loop("home", steps=2), batch=1, runs=1)
        artifact = quantize(model, schemes.W8A8, trajectory)
        assert "stem.0" in artifact.header["layers"]
        assert "stem.1" not in artifact.header["layers"]
        assert drift(model, artifact, trajectory.calls) < 0.2


def test_half_precision_models(tiny: Any, call_as: Any, loop: Any) -> None:
    """Calibrated in fp32, attached to the model as it is."""
    model, run = tiny("pixart").to(torch.bfloat16), loop("pixart", steps=2)

    def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
        x = run.noise(seed, batch).bfloat16()
        for t in run.times():
            given = {"text": torch.ones(batch, 5, 24, dtype=torch.bfloat16)}
            x = x - 0.3 * call_as("pixart", denoiser, x, t, given)
        return x

    trajectory = record(model, sample=sample, batch=2, runs=1)
    for scheme in (schemes.W4A8_STATIC, schemes.W8A8):
        artifact = quantize(model, recipe(model, scheme), trajectory)
        assert all(v.dtype is not torch.bfloat16 for v in artifact.tensors.values())
        assert drift(model, artifact, trajectory.calls) < 0.5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_callers_state_is_no_matter(tiny: Any, recorded: Any, tmp_path: Path) -> None:
    """In training mode, in `no_grad`, with other random state: the same bytes."""
    model, trajectory = tiny("dit"), recorded("dit")
    expected = data(quantize(model, recipe(model, schemes.W4A8), trajectory), tmp_path)
    model.train()
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        found = data(quantize(model, recipe(model, schemes.W4A8), trajectory), tmp_path)
    assert found == expected
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and all(m.training for m in model.modules())
    other = quantize(model, recipe(model, schemes.W4A8), trajectory, seed=1)
    assert data(other, tmp_path) != expected


# --- activation ranges ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_ranges_hold_what_was_seen_at_each_step(tiny: Any, kind: str, recorded: Any) -> None:
    """Min and max of every layer's inputs, step by step, with the weights already quantized."""
    model, trajectory = tiny(kind), recorded(kind)
    artifact = quantize(model, schemes.W8A8_STATIC, trajectory, temporal="none")
    twin = copy.deepcopy(model)
    with attach(model, artifact), torch.no_grad():
        for name, layer in layers(twin):
            layer.weight.copy_(model.get_submodule(name).weight)  # type: ignore[union-attr]
    seen: dict[str, list[list[float]]] = {n: [[], [], [], []] for n, _ in layers(twin)}
    row = 0

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen[name][row] += [float(args[0].min()), float(args[0].max())]

        return hook

    for name, layer in layers(twin):
        layer.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for call in trajectory.calls:
            row = call.row
            twin(**call.inputs)
    ranges = artifact.section("ranges")
    for name, steps in seen.items():
        scale, zero = ranges[f"{name}.scale"], ranges[f"{name}.zero_point"]
        assert scale.shape == zero.shape == (4,)
        for r, values in enumerate(steps):
            low, high = min(0.0, *values), max(0.0, *values)
            assert float(scale[r]) * 255 == pytest.approx(high - low, rel=1e-3, abs=1e-6)
            assert float(-zero[r] * scale[r]) == pytest.approx(low, abs=float(scale[r]))
    last = list(seen)[-1]
    assert len(ranges[f"{last}.scale"].unique()) > 1, "the same at every step"


def test_one_range_for_all_steps(tiny: Any, recorded: Any) -> None:
    form = schemes.W8A8_STATIC.activation
    assert form is not None
    one = Scheme("w8a8-one", schemes.W8A8.weight, replace(form, per_step=False))
    wide = quantize(tiny("dit"), one, recorded("dit")).section("ranges")
    steps = quantize(tiny("dit"), schemes.W8A8_STATIC, recorded("dit")).section("ranges")
    for key, value in wide.items():
        if key.endswith(".scale"):
            assert value.shape == (1,) and value[0] >= steps[key].max() * 0.999
    model = tiny("dit")
    artifact = quantize(model, one, recorded("dit"))
    assert drift(model, artifact, recorded("dit").calls) < 0.15


# --- long work ------------------------------------------------------------------------------------


class Stop:
    """Raises Cancelled at the `at`-th note; `at` None never does."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.notes = at, list[tuple[int, int, str]]()

    def __call__(self, done: int, total: int, note: str) -> None:
        self.notes.append((done, total, note))
        if self.at is not None and len(self.notes) > self.at:
            raise Cancelled


def test_progress_goes_forward_to_the_end(tiny: Any, kind: str, recorded: Any) -> None:
    model, watch, trajectory = tiny(kind), Stop(), recorded(kind, steps=2)
    quantize(model, recipe(model, schemes.W4A8_STATIC), trajectory, on_progress=watch)
    done = [d for d, _, _ in watch.notes]
    assert done == sorted(done)
    assert len({total for _, total, _ in watch.notes if total}) == 1, "the scale does not change"
    assert watch.notes[-1][0] == watch.notes[-1][1]
    assert all(0 <= d <= t for d, t, _ in watch.notes)


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The units that were really computed, as they are."""
    found: list[str] = []
    original = Job._quantized

    def counted(self: Any, unit: str, *args: Any) -> Any:
        found.append(unit)
        return original(self, unit, *args)

    monkeypatch.setattr(Job, "_quantized", counted)
    return found


@pytest.mark.parametrize("kind", ["pixart", "unet"])
def test_stopped_anywhere_it_goes_on_there(
    tiny: Any, kind: str, recorded: Any, worked: list[str], tmp_path: Path, bits: Any
) -> None:
    """At most one unit is done twice, and the file is the same, byte by byte."""
    model, trajectory = tiny(kind), recorded(kind, steps=2)
    chosen, watch = recipe(model, schemes.W4A8_STATIC), Stop()
    if kind == "unet":  # a part of it that has both blocks and layers outside of them
        chosen = Recipe(tuple(Rule(p, schemes.W4A8_STATIC, BRIEF) for p in ("mid*", "*samplers*")))
    expected = data(quantize(model, chosen, trajectory, on_progress=watch), tmp_path)
    units, before = list(worked), bits(model)
    for share in (0.0, 0.3, 0.6, 0.99):
        worked.clear()
        stop = Stop(int(share * len(watch.notes)))
        work = tmp_path / f"work {share}"
        with pytest.raises(Cancelled):
            quantize(model, chosen, trajectory, work=work, on_progress=stop)
        assert bits(model) == before
        assert not list(work.glob(".*")), "no half-written file"
        again = quantize(model, chosen, trajectory, work=work)
        assert data(again, tmp_path) == expected
        assert len(worked) <= len(units) + 1
        assert len(worked) < 2 * len(units) or share == 0.0


def test_stopped_again_and_again(
    tiny: Any, recorded: Any, worked: list[str], tmp_path: Path
) -> None:
    """A unit at a time: each call finishes one more."""
    model, trajectory = tiny("home"), recorded("home")
    chosen = recipe(model, schemes.W4A8)
    expected = data(quantize(model, chosen, trajectory), tmp_path)
    count, rounds = len(worked), 0
    worked.clear()

    class OneMore(Stop):
        def __call__(self, done: int, total: int, note: str) -> None:
            if len(worked) > rounds + 1:
                raise Cancelled

    while True:
        try:
            found = quantize(model, chosen, trajectory, work=tmp_path / "w", on_progress=OneMore())
            break
        except Cancelled:
            rounds += 1
            worked[rounds:] = []
    assert data(found, tmp_path) == expected
    assert rounds >= count - 2


def test_what_is_finished_is_not_done_again(
    tiny: Any, recorded: Any, worked: list[str], tmp_path: Path
) -> None:
    model, trajectory = tiny("dit"), recorded("dit")
    chosen = recipe(model, schemes.W4A8_STATIC)
    one = quantize(model, chosen, trajectory, work=tmp_path / "w")
    worked.clear()
    other = quantize(model, chosen, trajectory, work=tmp_path / "w")
    assert not worked
    assert data(one, tmp_path) == data(other, tmp_path)
    quantize(model, chosen, trajectory, work=tmp_path / "w", seed=1)
    assert worked, "another seed is another job"
    worked.clear()
    changed = tiny("dit")
    with torch.no_grad():
        for p in changed.parameters():
            p.mul_(1.1)
    quantize(changed, chosen, trajectory, work=tmp_path / "w", seed=1)
    assert worked, "another model is another job"
    worked.clear()
    more = recorded("dit", steps=3)
    quantize(changed, chosen, more, work=tmp_path / "w", seed=1)
    assert worked, "another recording is another job"


def test_a_damaged_unit_is_done_again(
    tiny: Any, recorded: Any, worked: list[str], tmp_path: Path
) -> None:
    model, trajectory = tiny("home"), recorded("home")
    chosen = recipe(model, schemes.W4A8)
    expected = data(quantize(model, chosen, trajectory, work=tmp_path / "w"), tmp_path)
    worked.clear()
    (tmp_path / "w" / "layers.1.safetensors").write_bytes(b"half a fi")
    again = quantize(model, chosen, trajectory, work=tmp_path / "w")
    assert worked == ["layers.1"]
    assert data(again, tmp_path) == expected


def test_killed_in_the_middle(tiny: Any, loop: Any, worked: list[str], tmp_path: Path) -> None:
    """SIGKILL, no warning: the same call goes on and ends in the bytes of an undisturbed one."""
    code = f"""
        import importlib.util, sys
        sys.path.insert(0, {str(Path(tenuto.__file__).parent.parent)!r})
        spec = importlib.util.spec_from_file_location("shared", {str(CONFTEST)!r})
        shared = importlib.util.module_from_spec(spec)
        sys.modules["shared"] = shared
        spec.loader.exec_module(shared)
        import torch
        import tenuto as tn
        from tenuto.calibration.algorithms.adaround import AdaRound
        torch.set_num_threads(1)
        model = shared._randomized(shared._made("home"))
        trajectory = tn.record(model, sample=shared.Loop("home"), batch=2, runs=1)
        rule = tn.Rule("layers.*", tn.schemes.W4A8, AdaRound(iterations=60, batch=8))
        note = lambda done, total, text: print(text, flush=True)
        tn.quantize(
            model, tn.Recipe((rule,)), trajectory, work={str(tmp_path / "w")!r}, on_progress=note
        ).save({str(tmp_path / "early")!r})
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "layers.1 rounding" in line:
            process.kill()
            break
    process.stdout.close()
    assert process.wait() == -9
    assert [p.name for p in (tmp_path / "w").glob("*.safetensors")] == ["layers.0.safetensors"]
    assert not (tmp_path / "early").exists()
    trajectory = record(tiny("home"), sample=loop("home"), batch=2, runs=1)
    rule = Rule("layers.*", schemes.W4A8, AdaRound(iterations=60, batch=8))
    found = quantize(tiny("home"), Recipe((rule,)), trajectory, work=tmp_path / "w")
    assert worked == ["layers.1", "layers.2"]
    expected = quantize(tiny("home"), Recipe((rule,)), trajectory)
    assert data(found, tmp_path) == data(expected, tmp_path)


CONFTEST = Path(__file__).parents[1] / "conftest.py"


# --- what the header says -------------------------------------------------------------------------


def test_the_header_tells_how_it_was_made(tiny: Any, recorded: Any) -> None:
    model, trajectory = tiny("dit"), recorded("dit")
    artifact = quantize(model, schemes.W4A8, trajectory, seed=5)
    header = json.loads(json.dumps(artifact.header))
    assert header["made"]["seed"] == 5 and header["made"]["calibration"] == trajectory.about()
    from tenuto.calibration.algorithms import algorithm

    again = Recipe.from_json(header["recipe"], algorithm)
    assert again == recipe_for(schemes.W4A8, describe(model), PRESETS["quick"].rounding())
    errors = {n: f["weight_error"] for n, f in header["layers"].items()}
    eight = [e for n, e in errors.items() if header["layers"][n]["scheme"] == "w8a8"]
    four = [e for n, e in errors.items() if header["layers"][n]["scheme"] == "w4a8"]
    assert 0 < max(eight) < min(four) < 0.5


class Experts(nn.Module):
    """One layer runs at every step, one at late steps alone, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.late, self.never = (nn.Linear(8, 8) for _ in range(3))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), self.always)])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.blocks[0](x)
        return self.late(x) if float(timestep[0]) < 500 else x


def test_stored_ranges_of_layers_that_a_step_or_none_calls(one_thread: None) -> None:
    """An expert's are those of the steps that called it; what never ran stays in float."""
    torch.manual_seed(0)
    model = Experts().eval()

    def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
        x = torch.randn(batch, 8, generator=torch.Generator().manual_seed(seed))
        for t in (900.0, 600.0, 300.0, 100.0):
            x = x - 0.1 * denoiser(x, torch.full((batch,), t))
        return x

    trajectory = record(model, sample=sample, batch=2, runs=1)
    found = quantize(model, schemes.W8A8_STATIC, trajectory)
    found.validate()
    scale = found.section("ranges")["late.scale"]
    assert bool(scale.isfinite().all()) and float(scale[0]) >= float(scale[2:].max())
    assert "never" not in found.header["layers"] and "weights/never.qdata" not in found.tensors
    assert "never" in quantize(model, schemes.W8A8, trajectory).header["layers"]
