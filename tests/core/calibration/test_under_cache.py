"""Calibration on the calls that are left when others are skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenuto import quantize, record, schemes
from tenuto.caching import CacheSchedule, Forecast
from tenuto.calibration import under_cache
from tenuto.calibration.algorithms.adaround import AdaRound
from tenuto.calibration.algorithms.gptq import GPTQ
from tenuto.calibration.bank import Bank, Rows
from tenuto.calibration.replay import inputs_of
from tenuto.errors import Cancelled, TenutoError
from tenuto.model import describe, override_
from tenuto.sampling import Trajectory

STEPS = 12


def level(t: float) -> tuple[float, float]:
    """Signal and noise of the loops at a timestep."""
    angle = float(t) / 1000 * math.pi / 2
    return math.cos(angle), math.sin(angle)


@pytest.fixture(scope="module")
def runs(tiny: Callable[[str], nn.Module], loop: Any) -> Trajectory:
    """Two runs of two images by the tiny PixArt, with what a forecast needs."""
    known: Any = {"prediction": "v", "noise": level, "batch": 2, "runs": 2}
    return record(tiny("pixart"), sample=loop("pixart", steps=STEPS), **known)


def planned(runs: Trajectory) -> list[int]:
    """The steps that a forecast computes at a speedup of two."""
    assert runs.kernel is not None
    plan = Forecast(runs.kernel, 2.0).plan(runs.timesteps)
    return [row for row, computes in enumerate(plan.computed) if computes]


def at(trajectory: Trajectory, row: int) -> list[Tensor]:
    """The samples of the calls of a step."""
    return [c.inputs["hidden_states"] for c in trajectory.calls if c.row == row]


def test_calls_are_those_that_a_forecast_leaves(
    runs: Trajectory, tiny: Callable[[str], nn.Module], bits: Callable[[nn.Module], Any]
) -> None:
    """At samples that are the same until something was skipped; the model is as it was."""
    model = tiny("pixart")
    before = bits(model)
    found = under_cache(model, runs, 2.0)
    assert bits(model) == before
    rows = planned(runs)
    assert [c.row for c in found.calls] == rows * 2 and len(rows) == STEPS // 2
    assert found.timesteps == runs.timesteps and found.under["computed"] == rows
    first = next(row for row in range(STEPS) if row not in rows)
    for row in rows:
        pairs = list(zip(at(found, row), at(runs, row), strict=True))
        assert all((x - y).norm() < 1e-4 * y.norm() for x, y in pairs) == (row < first)
        assert all((x - y).norm() < 0.7 * y.norm() for x, y in pairs)


def test_nothing_skipped_is_the_recording_again(
    runs: Trajectory, tiny: Callable[[str], nn.Module]
) -> None:
    found = under_cache(tiny("pixart"), runs, 1.0, weighted=False)
    assert [c.row for c in found.calls] == [c.row for c in runs.calls]
    for one, other in zip(found.calls, runs.calls, strict=True):
        x, y = one.inputs["hidden_states"], other.inputs["hidden_states"]
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)
        assert one.weight == other.weight == 1


class Blind(nn.Module):
    """Gives the same noise for every sample: an error is at the end what it was when made."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.off: dict[float, float] = {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = float(t)
        wave = torch.tensor([math.sin(time / 150), math.cos(time / 300), time / 1000, 1.0])
        return 0.1 * self.blocks[0](wave).view(1, 4, 1, 1).expand_as(x) + self.off.get(time, 0.0)


def sampled(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
    """DDIM of a model of noise, to the very end."""
    times = torch.linspace(999, 0, STEPS + 1)[:-1].round()
    x = torch.randn(batch, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    for t, after in zip(times, [*times[1:], torch.tensor(0.0)], strict=True):
        noise, (a, s), (b, r) = denoiser(x, t), level(t), level(after)
        x = b * (x - s * noise) / a + r * noise
    return x


def test_a_step_counts_what_its_error_does_to_the_result() -> None:
    """The square of what an error of 1 in a computed output, and all made of it, moves."""
    torch.manual_seed(0)
    model = Blind()
    known = record(model, sample=sampled, prediction="eps", noise=level, batch=1, runs=1)
    assert known.kernel is not None
    known = replace(known, kernel=replace(known.kernel, remaining=()))
    found = under_cache(model, known, 2.0)
    moved = []
    for call in found.calls:
        ends = []
        for off in (0.0, 0.5):
            model.off = {call.timestep: off}
            seen = list[Tensor]()

            def kept(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
                seen.append(sampled(denoiser, seed, batch))  # noqa: B023
                return seen[-1]  # noqa: B023

            under_cache(model, replace(known, sample=kept), 2.0)
            ends += seen
        moved.append(float((ends[1] - ends[0]).mean()) / 0.5)
    squares = torch.tensor(moved).square()
    weights = torch.tensor([c.weight for c in found.calls])
    assert torch.allclose(weights, squares / squares.mean(), rtol=1e-3, atol=1e-4)
    assert float(weights.max() / weights.min()) > 3


def test_of_a_schedule_steps_that_compute_nothing_are_left_out(
    runs: Trajectory, tiny: Callable[[str], nn.Module]
) -> None:
    model = tiny("pixart")
    names = [b.name for b in describe(model).branches]
    rows = [0, 1, 2, 5, 8]
    schedule = CacheSchedule.steps([i in rows for i in range(STEPS)], runs.timesteps, names)
    found = under_cache(model, runs, schedule)
    assert [c.row for c in found.calls] == rows * 2
    assert all(torch.equal(x, y) for x, y in zip(at(found, 2), at(runs, 2), strict=True))
    assert not torch.equal(at(found, 8)[0], at(runs, 8)[0])
    assert sum(c.weight for c in found.calls) == pytest.approx(2 * len(rows))


def test_runs_of_the_quantized_model(
    runs: Trajectory, tiny: Callable[[str], nn.Module], bits: Callable[[nn.Module], Any]
) -> None:
    """So that a calibration can be done again on what it has led to."""
    model = tiny("pixart")
    before = bits(model)
    found = under_cache(model, runs, 2.0, artifact=quantize(model, "w8a8", runs))
    assert bits(model) == before and found.under["quantized"]
    plain = under_cache(model, runs, 2.0)
    assert torch.equal(at(found, 0)[0], at(plain, 0)[0])
    assert not torch.equal(at(found, 1)[0], at(plain, 1)[0])


def test_ranges_are_of_the_calls_that_are_left(
    runs: Trajectory, tiny: Callable[[str], nn.Module]
) -> None:
    """A step that is skipped has the range of all others; tables are of every step all the same."""
    model, rows = tiny("pixart"), planned(runs)
    plain = quantize(model, "w8a8-static", runs)
    found = quantize(model, "w8a8-static", runs, under=2.0)
    assert found.header["made"]["under"]["computed"] == rows
    assert "under" not in plain.header["made"]
    name = next(k for k in found.tensors if k.startswith("ranges/") and "attn1.to_q.scale" in k)
    new, old = found.tensors[name], plain.tensors[name]
    assert new.shape == old.shape == (STEPS,)
    assert torch.equal(new[0], old[0]) and not torch.equal(new[rows[-1]], old[rows[-1]])
    skipped = [row for row in range(STEPS) if row not in rows]
    assert len({float(new[row]) for row in skipped}) == 1
    tables = [k for k in found.tensors if k.startswith("temporal/")]
    assert tables and all(torch.equal(found.tensors[k], plain.tensors[k]) for k in tables)


def test_blocks_are_rounded_on_them_and_it_resumes(
    runs: Trajectory, tiny: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    """Weighted or not they are other weights than without; a stopped job ends in the same bytes."""
    model = tiny("pixart")

    def made(under: Any, work: Path | None = None, note: Any = None) -> dict[str, Tensor]:
        how: Any = {"rounding": "gptq", "under": under, "work": work, "on_progress": note}
        found = quantize(model, schemes.W4A8, runs, **how).tensors
        return {k: v for k, v in found.items() if k.startswith("weights/")}

    def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

    whole, alike = made(2.0), made(under_cache(model, runs, 2.0, weighted=False))
    plain = made(None)
    assert not same(whole, plain) and not same(whole, alike)
    calls = 0

    def stop(done: int, total: int, words: str) -> None:
        nonlocal calls
        calls += "transformer_blocks.2" in words
        if calls > 2:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        made(2.0, tmp_path / "work", stop)
    assert same(made(2.0, tmp_path / "work"), whole)
    assert same(made(None, tmp_path / "work"), plain)  # the work of another job is not taken


def test_the_weights_of_rows_are_those_of_their_calls(
    runs: Trajectory, tiny: Callable[[str], nn.Module]
) -> None:
    model = tiny("pixart")
    found = under_cache(model, runs, 2.0)
    bank = inputs_of(model, "transformer_blocks.1", found.calls, "cpu")
    known = {c.row: c.weight for c in found.calls}
    assert bank.weights is not None
    assert bank.weights.tolist() == pytest.approx([known[s] for s in bank.steps.tolist()])
    assert bank.part(torch.tensor([3, 0])).weights.tolist() == bank.weights[[3, 0]].tolist()
    assert inputs_of(model, "transformer_blocks.1", runs.calls, "cpu").weights is None


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_to_count_three_times_is_to_be_there_three_times(kind: str) -> None:
    """GPTQ's sums of products, those to the outputs in full precision too."""
    draw = torch.Generator().manual_seed(0)
    if kind == "linear":
        block: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
        x = torch.randn(4, 3, 6, generator=draw)
    else:
        block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 1))
        x = torch.randn(4, 6, 4, 4, generator=draw)
    counts = torch.tensor([1, 3, 1, 2])
    changed = nn.Sequential(*(type(m)(*_sizes(m)) for m in block))
    template: Any = ((Rows(0),), {})

    def moments(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        bank = Bank(template, {0: rows}, {}, torch.zeros(len(rows)).long(), weights=weights)
        found = GPTQ()._moments(block, changed, ["1"], bank, torch.arange(len(rows)), "cpu")
        assert found is not None
        return found[0], found[1]["1"]

    with torch.no_grad():
        one = moments(x, counts.float())
        other = moments(x.repeat_interleave(counts, 0), None)
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert float(one[1].abs().max()) > 0.1


def _sizes(layer: Any) -> tuple[Any, ...]:
    """What makes another layer of the same kind."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size, 1, layer.padding


def test_adaround_fits_the_rows_that_count() -> None:
    """With all weight on half of the rows, these are nearer than with the same for all."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 24, generator=draw))
        x = torch.randn(64, 24, generator=draw)
        x[:32, :12], x[32:, 12:] = 0.0, 0.0
        target = layer(x)
    method, errors = AdaRound(iterations=400, batch=32, lr=0.02), []
    mixed = x @ torch.linalg.qr(torch.randn(24, 24, generator=draw))[0]
    with torch.no_grad():
        target = layer(mixed)
    for weights in (None, torch.tensor([1.99] * 32 + [0.01] * 32)):
        bank = Bank(((Rows(0),), {}), {0: mixed}, {}, torch.zeros(64).long(), weights=weights)
        (q,) = method(layer, {"": schemes.W4A16}, bank, target).values()
        found = nn.functional.linear(mixed, q.dequantize(), layer.bias)
        errors.append(float((found - target).detach()[:32].square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_what_cannot_be_is_said_before_anything_is_run(
    runs: Trajectory, tiny: Callable[[str], nn.Module]
) -> None:
    model, called = tiny("pixart"), 0

    def count(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called += 1
        return original(*args, **kwargs)

    patch = override_(model, count)
    with pytest.raises(TenutoError, match="see no recorded call"):
        quantize(model, "w8a8", runs, under=2.0)
    with pytest.raises(TenutoError, match="A speedup is a number"):
        quantize(model, "w8a8-static", runs, under=0.5)
    with pytest.raises(TenutoError, match="has no forecast"):
        quantize(model, "w8a8-static", replace(runs, kernel=None), under=2.0)
    with pytest.raises(TenutoError, match="cannot be run again"):
        quantize(model, "w8a8-static", replace(runs, sample=None), under=2.0)
    with pytest.raises(TenutoError, match="a recording of under_cache"):
        quantize(model, "w8a8-static", runs, under=runs)
    patch.remove()
    assert called == 0
