"""Forecasts of whole calls: the plan is the best there is, and a run keeps to it."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.artifact import Artifact, at_one, kernel_of
from tenuto.artifact.contents import curve
from tenuto.artifact.plots import figure
from tenuto.artifact.summary import about
from tenuto.caching import Forecast, ForecastCalls, Programme, forecast_plan
from tenuto.caching.forecast_plan import TAPS
from tenuto.errors import ArtifactError, TenutoError
from tenuto.model import denoiser_of, override_
from tenuto.sampling import Clock, OutputKernel
from tests.core import tiny_pipelines as tiny


def kernel(
    steps: int = 20, width: float = 0.7, prediction: str = "v", rough: float = 1e-3
) -> OutputKernel:
    """Of smooth random outputs, on a cosine schedule."""
    angle = torch.linspace(1.5, 0.05, steps, dtype=torch.float64)
    gap = angle[:, None] - angle
    values = torch.exp(-gap.square() / width) + rough * torch.eye(steps, dtype=torch.float64)
    times = tuple(torch.linspace(999, 20, steps, dtype=torch.float64).tolist())
    alpha, sigma = tuple(angle.cos().tolist()), tuple(angle.sin().tolist())
    return OutputKernel(values, times, alpha, sigma, prediction, 4)


def price(programme: Programme, computed: tuple[int, ...]) -> float:
    """What the docstring says that a table costs, one stretch after another."""
    total = 0.0
    for place, newest in enumerate(computed[1:], 1):
        taps = list(reversed(computed[max(0, place - 2) : place + 1]))
        end = computed[place + 1] if place + 1 < len(computed) else programme.steps
        moved = torch.zeros(programme.outputs.shape[1], dtype=torch.float64)
        for step in range(newest + 1, end):
            known = programme.outputs[taps]
            times = programme.times
            slope = (times[step] - times[taps[0]]) / (times[taps[0]] - times[taps[1]])
            start = torch.tensor([1 + slope, -slope, 0.0][: len(taps)], dtype=torch.float64)
            square = known @ known.T + programme.ridge * torch.eye(len(taps), dtype=torch.float64)
            gap = programme.outputs[step] - start @ known
            weights = start + torch.linalg.solve(square, known @ gap)
            moved += programme.gains[step] * (programme.outputs[step] - weights @ known)
        total += float(moved.square().sum())
    return total


@pytest.mark.parametrize("prediction", ["v", "eps", "flow"])
def test_no_table_costs_less(prediction: str) -> None:
    known = kernel(9, prediction=prediction)
    if prediction == "flow":
        share = tuple(torch.linspace(1, 0.1, 9, dtype=torch.float64).tolist())
        known = OutputKernel(
            known.values, known.timesteps, tuple(1 - s for s in share), share, "flow"
        )
    programme = Programme(known)
    for calls in range(2, 9):
        tables = ((0, 1, *rest) for rest in itertools.combinations(range(2, 9), calls - 2))
        least = min(price(programme, table) for table in tables)
        plan = programme.plan(calls)
        found = tuple(i for i, computes in enumerate(plan.computed) if computes)
        assert plan.calls == calls and plan.computed[:2] == (True, True)
        assert price(programme, found) == pytest.approx(least, rel=1e-6)
        assert plan.error == pytest.approx(least, rel=1e-6)
    assert sorted(programme.errors.values(), reverse=True) == list(programme.errors.values())


def test_outputs_that_three_others_span_are_forecast_exactly() -> None:
    steps = 12
    times = torch.linspace(1, 0, steps, dtype=torch.float64)
    outputs = torch.stack([torch.ones(steps).double(), times, times.square()])  # (3, T)
    noise = tuple((0.05 + 0.9 * times).tolist())
    known = OutputKernel(
        outputs.T @ outputs, tuple(times.tolist()), tuple(1 - s for s in noise), noise, "flow"
    )
    plan = Programme(known).plan(6)
    for step, (taps, weights) in enumerate(zip(plan.taps, plan.weights, strict=True)):
        if len(taps) >= 3:
            found = torch.tensor(weights, dtype=torch.float64) @ outputs.T[list(taps)]
            assert torch.allclose(found, outputs.T[step], atol=3e-3)  # but for the ridge
    assert any(len(taps) > 3 for taps in plan.taps)


def test_more_outputs_forecast_better_than_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one table: the error of its forecasts, the drift that is made up for left out."""
    programme = Programme(kernel(20, width=4.0, rough=1e-6))
    found = []
    for most in (3, TAPS):
        monkeypatch.setattr(forecast_plan, "TAPS", most)
        monkeypatch.setattr(forecast_plan, "FADING", 0.0)
        plan = programme.plan(12)
        assert max(len(taps) for taps in plan.taps) == most
        pairs = [(i, *pair) for i, pair in enumerate(zip(plan.taps, plan.weights, strict=True))]
        gaps = [
            torch.tensor(weights, dtype=torch.float64) @ programme.outputs[list(taps)]
            - programme.outputs[i]
            for i, taps, weights in pairs
            if taps and not pairs[i - 1][1]  # the first of a stretch
        ]
        found.append(float(torch.stack(gaps).square().sum()))
    assert found[1] < 0.8 * found[0]


def test_another_grid_is_interpolated() -> None:
    known = kernel(20)
    assert known.at(known.timesteps) is known
    half = known.at(known.timesteps[::2])
    assert torch.allclose(half.values, known.values[::2, ::2])
    assert half.sigma == pytest.approx(known.sigma[::2])
    smooth = kernel(20, width=4.0, rough=1e-6)
    finer = smooth.at(torch.linspace(999, 20, 50).tolist())
    wanted = kernel(50, width=4.0, rough=1e-6)
    assert float((finer.values - wanted.values).abs().max()) < 0.015
    assert finer.sigma == pytest.approx(wanted.sigma, abs=1e-3)


@pytest.mark.parametrize("steps", [9, 20, 30, 50])
@pytest.mark.parametrize("speedup", [1.0, 1.3, 2.0, 2.6])
def test_as_many_calls_as_asked(steps: int, speedup: float) -> None:
    plan = Forecast(kernel(20), speedup).plan(torch.linspace(999, 20, steps).tolist())
    assert plan.calls == int(steps / speedup + 1e-6)
    for step, taps in enumerate(plan.taps):
        assert all(plan.computed[tap] and tap < step for tap in taps)
        assert plan.computed[step] == (not taps)


def test_short_runs_and_stochastic_samplers_skip_nothing() -> None:
    forecast = Forecast(kernel(20), 2.0)
    assert all(forecast.plan(torch.linspace(999, 20, 8).tolist()).computed)
    assert all(forecast.plan(kernel(20).timesteps, stochastic=True).computed)
    assert all(forecast.plan(torch.linspace(999, 20, 16).tolist(), per_step=2.0).computed)
    with pytest.raises(TenutoError, match="speedup"):
        Forecast(kernel(20), 0.5)


# --- a run under a plan ---------------------------------------------------------------------------


class Line(nn.Module):
    """Answers with its sample; a table of what it was really called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, int]] = []
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> tuple[Tensor]:
        self.seen.append((float(timestep.flatten()[0]), len(sample)))
        return (sample * self.scale + prompt[:, :1],)


class Under:
    """A `Line` under a forecast at half of its calls, its clock moved by hand."""

    def __init__(self, steps: int = 12, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.times = Line().to(dtype), kernel(steps).timesteps
        self.clock = Clock(self.times)
        self.calls = ForecastCalls(self.clock, Forecast(kernel(steps), 2.0), self.model)
        self.patch = override_(self.model, self.calls)
        self.plan = Forecast(kernel(steps), 2.0).plan(self.times)
        self.dtype = dtype

    def __call__(self, step: int, streams: tuple[Any, ...], width: int = 3) -> Tensor | None:
        """What a call returns; its sample says step and stream, so that it is known."""
        self.clock.tick(self.times[step], streams)
        sample = torch.stack([torch.full((width,), self.value(step, s)) for s in streams])
        with torch.no_grad():
            prompt = torch.zeros(len(streams), 1, dtype=self.dtype)
            return self.model(sample.to(self.dtype), torch.tensor(self.times[step]), prompt)[0]

    @staticmethod
    def value(step: int, stream: Any) -> float:
        return math.cos(0.1 * step) + 0.5 * int(stream)

    def wanted(self, step: int, stream: Any) -> float:
        """What the plan says."""
        if self.plan.computed[step]:
            return self.value(step, stream)
        pairs = zip(self.plan.taps[step], self.plan.weights[step], strict=True)
        return sum(w * self.value(tap, stream) for tap, w in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_run_follows_the_plan(dtype: torch.dtype) -> None:
    run = Under(dtype=dtype)
    for step in range(12):
        found = run(step, (0, 1))
        assert found is not None and found.dtype is dtype
        for row in (0, 1):
            near = {"rel": 1e-4} if dtype is torch.float32 else {"rel": 0.06, "abs": 0.06}
            assert float(found[row, 0]) == pytest.approx(run.wanted(step, row), **near)
    assert run.calls.counts == [6, 6] and len(run.model.seen) == 6


def test_streams_in_any_order_and_in_two_calls() -> None:
    run = Under()
    for step in range(12):
        order = (0, 1) if step % 3 else (1, 0)
        parts = [order] if step % 2 else [(order[0],), (order[1],)]
        for part in parts:
            found = run(step, part)
            assert found is not None
            for row, stream in enumerate(part):
                assert float(found[row, 0]) == pytest.approx(run.wanted(step, stream), rel=1e-4)


def test_a_late_stream_computes_and_changes_nothing_for_the_others() -> None:
    run = Under()
    late = next(step for step in range(6, 12) if not run.plan.computed[step])
    for step in range(late):
        run(step, (0,))
    before = len(run.model.seen)
    found = run(late, (0, 7))
    assert found is not None and len(run.model.seen) == before + 1
    assert float(found[1, 0]) == pytest.approx(run.value(late, 7))


def test_a_changed_shape_and_an_unplanned_step_compute() -> None:
    run = Under()
    held = next(step for step in range(12) if not run.plan.computed[step])
    for step in range(held):
        run(step, (0,))
    before = len(run.model.seen)
    run(held, (0,), width=5)
    assert len(run.model.seen) == before + 1
    run.clock.tick(run.times[held] - 5.0, (0,))  # off every planned step
    run.model(torch.zeros(1, 3), torch.tensor(run.times[held] - 5.0), torch.zeros(1, 1))
    assert len(run.model.seen) == before + 2


def test_a_step_that_is_computed_beside_the_plan_costs_no_other_step_its_taps() -> None:
    """A skipped step that cannot be forecast computes, and what others are made of stays."""
    run, late = Under(20), []
    for step in range(20):
        lost = not run.plan.computed[step] and len(late) < 3
        run(step, (0,), width=5 if lost else 3)
        late += [step] * lost
    assert len(late) == 3 and run.calls.counts == [13, 7]


class Filling(Line):
    """Its first call of a run fills a cache, as that of FLUX.2 klein with reference images does."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, prompt: Tensor, kv_cache_mode: str = "cached"
    ) -> tuple[Tensor, ...]:
        (out,) = super().forward(sample, timestep, prompt)
        return (out, out) if kv_cache_mode == "extract" else (out,)


def test_a_run_that_begins_by_filling_a_cache_is_planned_from_the_next_step_on() -> None:
    model, times = Filling(), kernel(13).timesteps
    clock = Clock(times)
    override_(model, ForecastCalls(clock, made := Forecast(kernel(13), 2.0), model))
    plan, found = made.plan(times[1:]), []
    for step, time in enumerate(times):
        clock.tick(time, (0,))
        sample = torch.full((1, 3), Under.value(step, 0))
        mode = "cached" if step else "extract"
        with torch.no_grad():
            given = torch.tensor(time), torch.zeros(1, 1)
            found.append(model(sample, *given, kv_cache_mode=mode))
    assert len(found[0]) == 2 and all(len(out) == 1 for out in found[1:])
    assert len(model.seen) == 1 + plan.calls == 7
    for step, out in enumerate(found[1:]):
        if not plan.computed[step]:
            pairs = zip(plan.taps[step], plan.weights[step], strict=True)
            wanted = sum(w * Under.value(tap + 1, 0) for tap, w in pairs)
            assert float(out[0][0, 0]) == pytest.approx(wanted, rel=1e-4)


def test_no_output_crosses_runs_and_what_is_returned_is_new() -> None:
    run = Under()
    held = next(step for step in range(12) if not run.plan.computed[step])
    for step in range(held):
        run(step, (0,))
    run.clock.begin()
    before = len(run.model.seen)
    run(held, (0,))
    assert len(run.model.seen) == before + 1
    run = Under()
    for step in range(12):
        found = run(step, (0,))
        assert found is not None and float(found[0, 0]) == pytest.approx(
            run.wanted(step, 0), rel=1e-4
        )
        found.zero_()  # as a host does that adds to it in place


def test_a_copy_has_taps_of_its_own() -> None:
    run = Under()
    held = next(step for step in range(12) if not run.plan.computed[step])
    for step in range(held):
        run(step, (0,))
    twin = copy.deepcopy(run)
    run.calls.known.clear()
    before = len(twin.model.seen)
    twin(held, (0,))
    assert len(twin.model.seen) == before + 1  # it begins anew: nothing of the other is used
    run.patch.remove()
    assert "forward" not in run.model.__dict__


# --- from a pipeline to a file and back -----------------------------------------------------------


@pytest.fixture(scope="module")
def flux() -> Any:
    """Twelve steps of a flow model, quantized."""
    return tiny.flux()


@pytest.fixture(scope="module")
def artifact(flux: Any) -> Artifact:
    """What quantizing it gives."""
    return tn.quantize(flux, "w8a8", tn.record(flux, ["a", "b"], steps=12, guidance=3.0))


def latent(pipe: Any, steps: int = 12, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(
        "a dog", num_inference_steps=steps, generator=generator, output_type="latent", **options
    ).images


def test_every_calibration_has_a_forecast(flux: Any, artifact: Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path / "a.safetensors")
    found = Artifact.load(tmp_path / "a.safetensors")
    plain = latent(flux)
    with tn.attach(flux, found, speedup=2) as attached:
        half = latent(flux)
        assert attached.counts() == {"": [6, 6]}
        latent(flux, 20)
        assert attached.counts() == {"": [16, 16]}
        latent(flux, 8)
        assert attached.counts() == {"": [24, 16]}
    assert torch.equal(latent(flux), plain)
    assert torch.isfinite(half).all()
    with tn.attach(flux, found, speedup=1) as attached:
        latent(flux)
        assert attached.counts() == {"": [12, 0]}


def test_from_the_outputs_of_the_pipeline_itself(flux: Any) -> None:
    """The kernel is that of what the scheduler got, whatever guided it."""
    got: list[Tensor] = []
    step = flux.scheduler.step

    def noted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        got.append(output.double().flatten())
        return step(output, *args, **kwargs)

    flux.scheduler.step = noted
    try:
        found = tn.record(flux, ["a"], steps=10).kernel
        assert flux.scheduler.step is noted
    finally:
        del flux.scheduler.step
    rows = torch.stack(got)
    assert found is not None and found.prediction == "flow" and found.images == 1
    assert torch.allclose(found.values, rows @ rows.T / rows.shape[1])
    assert found.sigma == pytest.approx(found.timesteps)


def test_a_copied_scheduler_is_not_watched(flux: Any) -> None:
    from tenuto.sampling.step_outputs import StepOutputs

    outputs = StepOutputs(flux)
    flux.scheduler.set_timesteps(10, mu=1.0)
    with outputs.run(lambda: 1.0):
        twin = copy.deepcopy(flux.scheduler)
        twin.step(torch.zeros(1, 4), twin.timesteps[0], torch.zeros(1, 4))
        assert flux.scheduler.step_index is None
    assert "step" not in flux.scheduler.__dict__ and outputs.kernel() is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers
def test_an_ancestral_sampler_skips_nothing_and_has_no_kernel(artifact: Artifact) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    pipe = tiny.stable_diffusion("StableDiffusionPipeline")
    known = tn.record(pipe, ["a"], steps=10).kernel
    assert known is not None and known.prediction == "eps"
    made = Artifact.new(pipe, {"timesteps": known.timesteps, "steps": 10, "guidance": None})
    made.add_forecast(known)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with tn.attach(pipe, made, speedup=2) as attached:
        latent(pipe, 10, height=16, width=16)
        assert attached.counts()[""][1] == 0
    assert tn.record(pipe, ["a"], steps=10).kernel is None


def test_the_kernel_of_more_images_is_kept(artifact: Artifact) -> None:
    mine = artifact.header["forecast"]["images"]
    other = Artifact(dict(artifact.header), dict(artifact.tensors))
    other.header["forecast"] = other.header["forecast"] | {"images": mine - 1}
    other.tensors["forecast/kernel"] = artifact.tensors["forecast/kernel"] * 2
    for merged in (artifact | other, other | artifact):
        assert merged.header["forecast"]["images"] == mine
        kept = merged.tensors["forecast/kernel"]
        assert torch.equal(kept, artifact.tensors["forecast/kernel"])


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": [1.0] * 12}, {"alpha": [math.inf] * 12}, {"sigma": []}, {"images": "many"},
        {"prediction": "rain"}, None,
    ],
)  # fmt: skip
def test_damage_is_told(artifact: Artifact, change: dict[str, Any] | None, flux: Any) -> None:
    header = dict(artifact.header)
    header["forecast"] = None if change is None else header["forecast"] | change
    with pytest.raises(ArtifactError, match="forecast"):
        Artifact(header, artifact.tensors).validate()
    with pytest.raises(ArtifactError, match="speedup"):
        tn.attach(denoiser_of(flux), "w8a8", speedup=2)


def test_half_of_the_calls_of_a_trained_model_is_nearer_than_reuse() -> None:
    pipe = tn.demo("unet")
    pipe.set_progress_bar_config(disable=True)
    trajectory = tn.record(pipe, tn.prompts("default")[:2], steps=20, guidance=2.5)
    assert trajectory.kernel is not None
    made = Artifact.new(pipe, trajectory.schedule()).add_forecast(trajectory.kernel)
    denoiser = denoiser_of(pipe)

    def generated() -> Tensor:
        generators = [torch.Generator().manual_seed(10_000 + i) for i in range(2)]
        return pipe(
            tn.prompts("evaluation")[:2], num_inference_steps=20, guidance_scale=2.5,
            generator=generators, output_type="pt",
        ).images  # fmt: skip

    full = generated()
    with tn.attach(pipe, made, speedup=2) as attached:
        error = float((generated() - full).square().mean())
        assert attached.counts() == {"": [10, 10]}
    late = tn.CacheSchedule.steps(
        [i < 3 or i % 2 == 0 for i in range(20)],
        trajectory.timesteps,
        [b.name for b in tn.describe(denoiser).branches],
    )
    made.header["route"] = {"timesteps": list(late.timesteps), "branches": list(late.branches)}
    made.tensors["route/table"] = late.table
    with tn.attach(pipe, made):
        reused = float((generated() - full).square().mean())
    assert error < reused / 10
    assert -10 * math.log10(error) > 45


def test_the_curve_is_plotted(artifact: Artifact) -> None:
    bare = Artifact(
        {k: v for k, v in artifact.header.items() if k not in ("layers", "temporal")},
        {k: v for k, v in artifact.tensors.items() if k.startswith("forecast/")},
    )
    found = curve(bare.header, bare.tensors)
    assert found is not None and found.steps == 12
    kept = kernel_of(bare)
    assert kept is not None
    assert found.errors[6] == Programme(kept).plan(6).error
    drawn = figure(bare.header, bare.tensors, "a")
    (axes,) = drawn.axes
    assert axes.get_lines()[0].get_xdata().tolist() == sorted(found.errors)
    text = about("a.safetensors", artifact, 1)
    assert "2 x: 6 calls of 12" in text
    scores = artifact.header["forecast"]["measured"]["scores"]  # measured, of a model so small
    assert (
        axes.get_lines()[1].get_xdata().tolist() == [row["skipped"] for row in scores] == [4, 6, 8]
    )
    assert axes.get_lines()[1].get_ydata().tolist() == [row["psnr_db"] for row in scores]
    assert f"measured {scores[1]['psnr_db']:.1f} dB" in " ".join(text.split())
    one = at_one(bare.header["forecast"])
    wanted = sorted(row["psnr_db"] + 10 * math.log10(row["predicted"]) for row in scores)[1]
    assert one == pytest.approx(wanted)
    assert found.predicted[6] == pytest.approx(min(100, one - 10 * math.log10(found.errors[6])))
