"""Float weights out of the way while they are replaced, and tables at any number of steps."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import attach, quantize, record
from tenuto.errors import ModelError, TenutoError
from tenuto.model import Parked, Swap, denoiser_of, describe, layers
from tenuto.numerics.scheme import Recipe, Rule
from tenuto.runtime import TemporalTable
from tenuto.sampling import Clock
from tests.core.family_pipelines import qwen_image
from tests.core.model.conftest import FAMILIES, built
from tests.patience import PATIENCE

STEPS = (4, 8, 20, 50)


@pytest.fixture(scope="module")
def ready() -> Any:
    """A tiny Qwen-Image, and an artifact of tables alone, of 7 steps: nothing else is changed."""
    from tenuto import schemes

    made = qwen_image()
    names = ("*_mod.*", "time_text_embed.*", "norm_out.*")
    recipe = Recipe(tuple(Rule(name, schemes.W8A8) for name in names))
    trajectory = record(
        made.model, made.prompts, guidance=made.guidance, call=made.call, steps=7, batch=1
    )
    artifact = quantize(made.model, recipe, trajectory, temporal="table")
    assert not artifact.header["layers"], "the tables hold them all"
    return made, artifact


def image(ready: Any, steps: int, seed: int = 0) -> Tensor:
    pipe = ready.model
    pipe.set_progress_bar_config(disable=True)
    given = ready.call | {"num_inference_steps": steps, "output_type": "latent"}
    given |= {"true_cfg_scale": ready.guidance}
    return pipe(ready.prompts[0], generator=torch.Generator().manual_seed(seed), **given).images


def weights(model: nn.Module) -> list[tuple[Tensor, tuple[int, ...]]]:
    return [(p.detach().clone(), p.stride()) for p in model.parameters()]


@pytest.fixture
def calls(monkeypatch: Any) -> Counter[str]:
    """How often a table's module computed."""
    count: Counter[str] = Counter()
    original = TemporalTable._computed

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count["computed"] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TemporalTable, "_computed", counted)
    return count


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_tables_hold_at_any_number_of_steps(ready: Any, place: str, calls: Any) -> None:
    """Within 1e-3 of the model without, at 4, 8, 20 and 50 steps; weights are brought in once."""
    made, artifact = ready
    model = denoiser_of(made.model)
    before, plain = weights(model), {n: image(made, n) for n in STEPS}
    with attach(made.model, artifact, originals=place):
        tables = [m for m in model.modules() if isinstance(m, TemporalTable)]
        for steps, wanted in plain.items():
            calls.clear()
            found = image(made, steps)
            assert float((found - wanted).norm() / wanted.norm()) < 1e-3, steps
            news = calls["computed"] / len(tables)
            assert news == int(news) and news <= steps, "one answer a step and table, at the most"
            assert news >= steps / 4, "of a schedule that was not calibrated"
            again = image(made, steps, seed=1)
            assert calls["computed"] / len(tables) == news, "the second image brings in nothing"
            assert torch.isfinite(again).all()
    for (one, strides), parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(one, parameter) and parameter.stride() == strides
    assert torch.equal(image(made, 20), plain[20])


def test_uncalibrated_steps_are_exact(ready: Any) -> None:
    """A step without a row is computed by the module itself: bit for bit, when it first comes."""
    made, artifact = ready
    model, seen = denoiser_of(made.model), list[tuple[Any, Tensor]]()
    hook = model.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((kwargs, out[0].clone())), with_kwargs=True
    )
    image(made, 3)
    hook.remove()
    times = artifact.header["schedule"]["timesteps"]
    far = [
        (k, out) for k, out in seen if min(abs(float(k["timestep"][0]) - t) for t in times) > 0.01
    ]
    assert len(far) == 4, "two of three steps, with and without the prompt"
    with attach(model, artifact, originals="disk"), torch.no_grad():
        first = [model(**kwargs)[0] for kwargs, _ in far]
        second = [model(**kwargs)[0] for kwargs, _ in far]
    assert torch.equal(first[0], far[0][1]) and torch.equal(first[2], far[2][1])
    for out, (_, wanted) in zip((*first, *second), far * 2, strict=True):
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


def test_weights_leave_memory(ready: Any) -> None:
    """On disk they lie in a mapped file; a quantized layer's bias, which computes, stays."""
    made, _ = ready
    model = denoiser_of(made.model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    held = {n: layer.weight.data_ptr() for n, layer in layers(model)}
    bias = {n: layer.bias.data_ptr() for n, layer in layers(model) if layer.bias is not None}
    with attach(model, "w8a8", originals="disk") as attached:
        parked = next(p for p in attached.patches if isinstance(p, Parked))
        replaced = {swap.name: swap.old for swap in attached.swaps()}
        assert len(parked.moved) >= len(replaced) > 10
        for name, layer in replaced.items():
            assert layer.weight.data_ptr() != held[name]
            if name in bias:
                assert layer.bias.data_ptr() == bias[name]
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not parked.moved


RESIDENT = """
import torch
from pathlib import Path
from torch import nn
from tenuto.model import Parked, Swap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

once = nn.Sequential(nn.Linear(8, 8))  # what the first one imports is not counted
Parked([Swap(once, "0", nn.Identity())], [once], "disk").remove()
model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096))  # 128 MiB
values = [p[:2].clone() for p in model.parameters()]
before = resident()
swaps = [Swap(model, name, nn.Identity()) for name in ("0", "1")]
parked = Parked(swaps, [model], "disk")
print((before - resident()) >> 20)
parked.remove()
for swap in reversed(swaps):
    swap.remove()
print(all(torch.equal(p[:2], v) for p, v in zip(model.parameters(), values, strict=True)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what is resident")
def test_resident_memory_falls() -> None:
    """By the weights that are on disk, which the process has in memory again after detaching.

    In a process of its own: libraries of other tests tell malloc to keep what is freed.
    """
    command = [sys.executable, "-W", "ignore", "-c", RESIDENT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    fallen, equal = done.stdout.split()
    assert int(fallen) > 100 and equal == "True"


def test_strides_and_what_is_shared_stay() -> None:
    """Channels last comes back so; a weight that the model still has elsewhere is not moved."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.one.weight

    model = Two()
    strides, values = model.conv.weight.stride(), model.conv.weight.clone()
    swaps = [Swap(model, "conv", nn.Identity()), Swap(model, "one", nn.Identity())]
    shared = model.other.weight.data_ptr()
    parked = Parked(swaps, [model], "disk")
    assert {id(t) for _, t in parked.moved} == {
        id(swaps[0].old.weight), id(swaps[0].old.bias), id(swaps[1].old.bias),  # type: ignore
    }  # fmt: skip
    assert model.other.weight.data_ptr() == shared
    parked.remove()
    for swap in reversed(swaps):
        swap.remove()
    assert model.conv.weight.stride() == strides and torch.equal(model.conv.weight, values)
    assert model.one.weight is model.other.weight


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_knows_its_model_with_tables_in_it(name: str) -> None:
    """Compiling and cache policies describe a model that has its tables by then."""
    model = built(FAMILIES[name])
    before = describe(model)
    swaps = [
        Swap(
            model, n, TemporalTable(model.get_submodule(n), [torch.zeros(1, 1)], True, Clock((1,)))
        )
        for n in before.temporal
    ]
    assert describe(model) == before
    for swap in reversed(swaps):
        swap.remove()


def test_a_model_that_is_cast_meanwhile_comes_back_cast(ready: Any) -> None:
    made, artifact = ready
    model = copy.deepcopy(denoiser_of(made.model))
    wanted = copy.deepcopy(model).to(torch.float64).state_dict()
    with attach(model, artifact, originals="disk"):
        model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())


def test_rows_at_different_timesteps_compute_and_keep_nothing() -> None:
    clock, module = Clock((999.0, 500.0, 1.0)), nn.Linear(4, 6)
    table = TemporalTable(module, [torch.randn(3, 6).half()], True, clock)
    table.park(True)
    x = torch.randn(2, 4)
    with torch.no_grad():
        clock.observe(torch.tensor([700.0, 300.0]), 2, [], "cpu")
        assert torch.equal(table(x), module(x)) and "further_0" not in table._buffers
        clock.observe(torch.tensor([700.0, 700.0]), 2, [], "cpu")
        alike = x[:1].expand(2, 4)
        assert torch.equal(table(alike), module(alike)), "the first answer is the module's"
        assert clock.further.missing is True
        clock.tick(700.0, (0,))
        assert clock.further.missing is False
        torch.testing.assert_close(table(torch.zeros(3, 4)), module(x[:1]).expand(3, 6))
        table.double()
        clock.tick(700.0, (0,))
        assert clock.further.missing, "a cast forgets what was kept"


def test_rows_are_forgotten_when_there_are_too_many() -> None:
    clock, module = Clock((999.0,)), nn.Linear(4, 6)
    table = TemporalTable(module, [torch.randn(1, 6).half()], True, clock)
    table.park(True)
    clock.further.most = 40
    with torch.no_grad():
        for t in range(100):
            x = torch.full((1, 4), float(t))
            clock.tick(900.0 - t, (0,))
            assert torch.equal(table(x), module(x))
            assert len(table.get_buffer("further_0")) <= 64
            clock.tick(900.0 - t, (0,))
            torch.testing.assert_close(table(x.zero_()), module(torch.full((1, 4), float(t))))


def test_an_interrupted_step_is_filled_later() -> None:
    """A table that was not called at a timestep has no row there, whatever the others have."""
    clock, module = Clock((999.0,)), nn.Linear(4, 6)
    one, other = (TemporalTable(module, [torch.randn(1, 6).half()], True, clock) for _ in range(2))
    for table in (one, other):
        table.park(True)
    x = torch.randn(1, 4)
    with torch.no_grad():
        clock.tick(700.0, (0,))
        one(x)
        clock.tick(700.0, (0,))
        assert clock.further.missing
        assert torch.equal(other(x), module(x))
        clock.tick(700.0, (0,))
        assert not clock.further.missing
        assert torch.equal(other(x), one(x))


def test_compiled_and_captured_calls_wait_until_rows_are_there() -> None:
    """One graph for all steps that have rows; none while they are made."""
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounter

    from tenuto.runtime.weights_in_place import InPlaceWeights

    reset()
    counter, clock, module = CompileCounter(), Clock((999.0, 500.0)), nn.Linear(4, 6)
    table = TemporalTable(module, [torch.randn(2, 6).half()], True, clock)
    table.park(True)
    root = nn.Sequential(table)
    watch = InPlaceWeights(root, "cpu")
    compiled, x = torch.compile(table, backend=counter), torch.ones(2, 4)
    with torch.no_grad():
        for t in (700.0, 300.0):
            clock.tick(t, (0,))
            watch.state()
            assert watch.filling
            assert torch.equal(compiled(x), module(x))
        made = counter.frame_count
        states = set()
        for t in (700.0, 300.0, 700.0):
            clock.tick(t, (0,))
            states.add(watch.state())
            assert not watch.filling
            assert torch.allclose(compiled(x), module(x), atol=1e-6)
        assert counter.frame_count == made + 1 and len(states) == 1
    reset()


@torch.no_grad()
def test_a_graph_reads_the_rows_of_its_step(monkeypatch: Any) -> None:
    """Steps are filled as they are, then captured once and replayed for every timestep."""
    from tenuto.model import override_
    from tenuto.runtime.denoiser_call import DenoiserCall
    from tenuto.runtime.graphs import Graphs
    from tests.core.runtime.recorded import Recorded, alike

    class Timed(nn.Module):
        def __init__(self, time: nn.Module) -> None:
            super().__init__()
            self.time, self.out = time, nn.Linear(6, 6)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.out(x * self.time(t[:, None]))

    clock, module = Clock((999.0, 500.0)), nn.Linear(1, 6)
    rows = [module(torch.tensor([[t]]))[0] for t in clock.timesteps]
    table = TemporalTable(module, [torch.stack(rows)], True, clock)
    model, plain = Timed(table), Timed(module)
    plain.out = model.out
    table.park(True)
    again, original = Recorded(), TemporalTable._computed

    def computed(self: Any, *args: Any) -> Any:
        assert not torch._C._len_torch_dispatch_stack(), "weights were brought in by a graph"
        return original(self, *args)

    monkeypatch.setattr(TemporalTable, "_computed", computed)
    override_(model, DenoiserCall(Graphs(model, capture=lambda _: again, device="cpu")))
    times = (999.0, 700.0, 500.0, 300.0, 100.0)
    for run in range(4):
        for t in times:
            clock.tick(t, (0,))
            x, step = torch.randn(2, 6), torch.full((2,), t)
            assert alike(model(x, step), plain(x, step)), (run, t)
    assert again.captured == 2, "steps that were calibrated, and the others"
    assert again.replayed > 8


def test_released_while_parked(ready: Any) -> None:
    made, artifact = ready
    model = copy.deepcopy(denoiser_of(made.model))
    attached = attach(model, artifact, originals="disk")
    attached.release()
    gc.collect()
    tables = [m for m in model.modules() if isinstance(m, TemporalTable)]
    assert tables and not any(t._original or t.parked for t in tables)
    with pytest.raises(ModelError, match="released"):
        attached.detach()


def test_wrong_places_are_refused(ready: Any, monkeypatch: Any) -> None:
    import errno
    import os

    made, artifact = ready
    model = denoiser_of(made.model)
    with pytest.raises(TenutoError, match="originals='gpu'"):
        attach(model, artifact, originals="gpu")
    before = [(p, p.data_ptr()) for p in model.parameters()]

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if hasattr(os, "posix_fallocate"):
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ModelError, match="no room"):
            attach(model, artifact, originals="disk")
        assert all(p.data_ptr() == place for p, place in before)
        assert not any(isinstance(m, TemporalTable) for m in model.modules())


# --- how large the file is ------------------------------------------------------------------------


def test_the_size_is_that_of_the_file(ready: Any) -> None:
    """Byte for byte, of a tiny model; the very count that the benchmark has of the released one."""
    from tenuto import schemes
    from tenuto.calibration.check.file_size import file_size

    made, _ = ready
    trajectory = record(made.model, made.prompts, guidance=made.guidance, call=made.call,
                        steps=5, batch=1)  # fmt: skip
    artifact = quantize(made.model, "w4a8", trajectory, rounding="nearest", temporal="table")
    model = denoiser_of(made.model)
    found = file_size(model, schemes.W4A8, 5, trajectory.calls[0].inputs)
    sizes: Counter[str] = Counter()
    for key, tensor in artifact.tensors.items():
        sizes[key.split("/")[0]] += tensor.nbytes
    spared = artifact.header.get("kept_in_float", {})
    assert not spared, "all layers that the recipe names have codes"
    assert sizes["temporal"] == found.tables
    assert sizes["weights"] == sum(found.codes.values())
    assert sum(found.weights.values()) == sum(p.numel() for p in model.parameters())


def test_a_file_of_qwen_image_is_a_fifth_of_the_model() -> None:
    """At its released size, without memory: 67 % of the weights in 4 bits, the rest in tables."""
    from benchmarks.temporal_tables import size

    found = size()
    assert found["model"] > 40e9
    assert found["share"] <= 0.2
    weights = found["weights"]
    assert sum(weights.values()) * 2 == found["model"]
    assert 0.66 < weights["4"] / sum(weights.values()) < 0.67
    assert 0.33 < weights["tables"] / sum(weights.values()) < 0.34
    assert found["shares"]["tables"] < 0.006
    bits = 8 * found["bytes"]["codes of 4 bits"] / weights["4"]
    assert 4.25 <= bits <= 4.55


def test_what_a_model_looks_at_inside_a_table_is_there() -> None:
    """Wan-Animate asks a layer of its time embedding for its dtype; others index a `Sequential`."""
    inside = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8))
    table = TemporalTable(inside, [torch.zeros(3, 8)], True, Clock((900.0, 500.0, 100.0)))
    named: Any = table[2]
    assert named.weight.dtype is torch.float32 and not named.weight.numel()
    assert getattr(table, "0").bias.dtype is torch.float32
    assert table.bfloat16()[0].weight.dtype is torch.bfloat16
    table.release()
    assert table[0].weight.dtype is torch.bfloat16
    with pytest.raises(AttributeError):
        table.linear_1  # noqa: B018
    assert {name for name, _ in table.named_modules()} == {""}
