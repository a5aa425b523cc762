"""The forecast without calibration: shipped kernels, looked up by noise; and the budget."""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tenuto as tn
from tenuto.artifact import Artifact, default_speedup, kernel_of, set_default
from tenuto.caching import Forecast, about_db, about_defaults, calls_for, default_kernel
from tenuto.caching.forecast_budget import SAFE, check_speedup
from tenuto.calibration.check import estimates
from tenuto.calibration.forecast_scores import measurable, with_scores
from tenuto.errors import ArtifactError, ModelError, TenutoError
from tenuto.model import denoiser_of
from tenuto.runtime import Patches
from tenuto.runtime.default_forecast import default_kernel_of, with_default
from tenuto.sampling import NoiseKernel, OutputKernel, PipelineNoise, noises_at
from tests.core import tiny_pipelines as tiny


def circle(times: Any) -> list[tuple[float, float]]:
    """The noise of a schedule whose timestep is 1000 times the angle."""
    return [(math.cos(t / 1000), math.sin(t / 1000)) for t in times]


# --- what ships -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["v", "eps", "flow"])
def test_every_shipped_kernel_is_one(prediction: str) -> None:
    found = default_kernel(prediction, circle)
    assert isinstance(found, NoiseKernel) and found.prediction == prediction
    assert float(torch.linalg.eigvalsh(found.values).amin()) > -1e-6
    assert list(found.timesteps) == sorted(found.timesteps, reverse=True)
    assert found.timesteps[0] > 1.5 and found.timesteps[-1] < 0.1  # nearly all noise, nearly none
    angles = [math.atan2(s, a) for a, s in zip(found.alpha, found.sigma, strict=True)]
    assert angles == pytest.approx(found.timesteps)
    about = about_defaults()
    assert set(about["origin"]["models"]) == {"demo:transformer", "demo:unet"}
    assert about["kernels"][prediction]["schedules"]


def test_what_no_kernel_ships_for() -> None:
    for prediction in ("x0", None):
        with pytest.raises(TenutoError, match="no default forecast"):
            default_kernel(prediction, circle)


def test_a_kernel_is_looked_up_by_noise() -> None:
    known = default_kernel("v", circle)
    own = known.at([1000 * angle for angle in known.timesteps])
    assert torch.allclose(own.values, known.values)
    angles = torch.linspace(1.4, 0.2, 12).tolist()
    one = known.at([1000 * a for a in angles])
    other = default_kernel("v", lambda times: circle([t * 10 for t in times]))
    two = other.at([100 * a for a in angles])
    assert torch.allclose(one.values, two.values) and one.timesteps != two.timesteps
    assert one.sigma == pytest.approx([math.sin(a) for a in angles])
    assert known.mark != other.mark == other.mark
    with pytest.raises(TenutoError, match="noise"):
        default_kernel("v", lambda _: None).at((3.0, 2.0, 1.0))


def test_the_noise_in_any_unit_of_time() -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    flow = FlowMatchEulerDiscreteScheduler()
    for times in ((1000.0, 250.0), (1.0, 0.25), (0.0, 0.75)):  # t, t / 1000, 1 - t / 1000
        assert noises_at(flow, times) == [(0.0, 1.0), (0.75, 0.25)]
    betas = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ((alpha, sigma),) = noises_at(betas, (500.0,)) or [(0, 0)]
    assert alpha**2 == pytest.approx(float(betas.alphas_cumprod[500]))
    assert alpha**2 + sigma**2 == pytest.approx(1)


# --- on models that were never recorded -----------------------------------------------------------


def latent(pipe: Any, steps: int = 12, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(
        "a dog", num_inference_steps=steps, generator=generator, output_type="latent", **options
    ).images


@pytest.fixture(scope="module")
def flux() -> Any:
    """A flow model."""
    return tiny.flux()


def test_half_of_the_calls_without_an_artifact(flux: Any, caplog: Any) -> None:
    plain = latent(flux)
    for given in ({"artifact": "forecast-default", "speedup": 2}, {"speedup": 2}):
        caplog.clear()
        from tenuto.caching.forecast_plan import PLANS

        PLANS.clear()  # of this process: a warning comes once for each plan
        with caplog.at_level(logging.WARNING, "tenuto"), tn.attach(flux, **given) as attached:
            assert attached.forecast() == {
                "steps": 0, "skipped": 0, "kernel": "forecast-default", "predicted_db": 100.0,
            }  # fmt: skip
            latent(flux)
            half = latent(flux)
            assert attached.counts() == {"": [12, 12]}
            said = attached.forecast()
        assert said is not None and (said["steps"], said["skipped"]) == (12, 6)
        assert 10 < said["predicted_db"] < 80
        (warned,) = [r.message for r in caplog.records if "not measured on your model" in r.message]
        assert f"{said['predicted_db']:.0f} dB" in warned and "6 of 12" in warned
        assert torch.isfinite(half).all() and not torch.equal(half, plain)
    assert torch.equal(latent(flux), plain)


def test_a_comparison_says_that_calls_were_skipped(flux: Any) -> None:
    found = tn.compare(flux, prompts=["a"], count=1, steps=12, speedup=2)
    assert found.whole_calls and found.reuse_ratio == 0.5
    lines = [line.split() for line in str(found).splitlines()]
    assert ["calls", "skipped", "50.0%"] in lines and ["work", "skipped", "50.0%"] in lines


@pytest.mark.parametrize("kind", ["eps", "rising"])
def test_other_predictions_and_times(kind: str) -> None:
    """Of an eps model, and of one whose time rises in a run."""
    if kind == "eps":
        pipe: Any = tiny.stable_diffusion("StableDiffusionPipeline")
        options: dict[str, Any] = {"height": 16, "width": 16}
    else:
        pipe, options = tiny.z_image(), {"height": 32, "width": 32}
    pipe.set_progress_bar_config(disable=True)
    with tn.attach(pipe, speedup=2) as attached:
        latent(pipe, 10, **options)
        computed, skipped = attached.counts()[""]
    assert computed == skipped > 0


def test_what_cannot_be_forecast(flux: Any) -> None:
    with pytest.raises(ArtifactError, match="what to attach"):
        tn.attach(flux)
    with pytest.raises(ModelError, match="pipeline"):
        tn.attach(denoiser_of(flux), speedup=2)
    with pytest.raises(ModelError, match="one denoiser"):
        tn.attach(tiny.wan(transformer_2=tiny.wan_denoiser(1)), "forecast-default")
    for wrong in (0.5, "fast", True, math.nan):
        with pytest.raises(TenutoError, match="speedup"):
            tn.attach(flux, speedup=wrong)
    assert not [m for m in denoiser_of(flux).modules() if "forward" in vars(m)]


def test_a_kernel_of_the_model_replaces_the_shipped_one(flux: Any) -> None:
    made = Artifact.new(flux, {"timesteps": [1.0, 0.5], "steps": 2, "guidance": None})
    assert isinstance(with_default(flux, Patches(made, speedup=2)).kernel, NoiseKernel)
    times = tuple(torch.linspace(1, 0.1, 10).double().tolist())
    rest = tuple(1 - t for t in times)
    made.add_forecast(OutputKernel(torch.eye(10).double(), times, rest, times, "flow"))
    assert with_default(flux, Patches(made, speedup=2)).kernel is None
    with tn.attach(flux, made, speedup=2) as attached:
        latent(flux)
        said = attached.forecast()
    assert said is not None and said["kernel"] == "" and said["skipped"] == 6


def test_the_pipeline_is_not_kept_alive() -> None:
    pipe = tiny.flux()
    found = default_kernel_of(pipe)
    assert found.noise((1.0, 0.5)) == [(0.0, 1.0), (0.5, 0.5)]
    gone = weakref.ref(pipe)
    del pipe
    import gc

    gc.collect()
    assert gone() is None and PipelineNoise(gone)((1.0, 0.5)) is None


# --- the budget -----------------------------------------------------------------------------------


def test_auto_is_the_largest_share_that_is_safe() -> None:
    errors = {2: 1.0, 5: 2 * SAFE, 6: SAFE, 7: SAFE / 2, 9: 0.0}
    assert calls_for(errors, 10, "auto") == 6
    assert calls_for({5: 1.0}, 10, "auto") == 10
    assert [calls_for(errors, 10, s) for s in (1, 1.8, 2.5, 100)] == [10, 5, 4, 2]
    for wrong in (0.9, "Auto", None, [2], math.inf * 0):
        with pytest.raises(TenutoError, match="speedup"):
            check_speedup(wrong)


def test_an_error_is_told_in_db(caplog: Any) -> None:
    assert about_db(1.0) == pytest.approx(13.5)
    assert about_db(SAFE) == pytest.approx(48.7, abs=0.1)
    kernel = default_kernel("v", circle)
    times = [1000 * a for a in kernel.timesteps]
    with caplog.at_level(logging.WARNING, "tenuto"):
        bare = OutputKernel.at(kernel, kernel.timesteps)
        plain = OutputKernel(bare.values, tuple(times), bare.alpha, bare.sigma, bare.prediction, 1)
        bad = Forecast(plain, 8.0).plan(times)
        assert Forecast(plain, 8.0).plan(times) is bad
        assert about_db(bad.error) < 35
        assert [r.message for r in caplog.records if "visibly" in r.message] != []
        assert len(caplog.records) == 1  # once
        caplog.clear()
        fine = Forecast(plain, "auto").plan(times)
    assert 2 < fine.calls < len(times) and fine.error <= SAFE and not caplog.records


@pytest.fixture(scope="module")
def trajectory(flux: Any) -> tn.Trajectory:
    """Twelve steps of it."""
    return tn.record(flux, ["a", "b", "c", "d"], steps=12)


def test_the_default_of_an_artifact(flux: Any, trajectory: Any, tmp_path: Any) -> None:
    made = Artifact.new(flux, trajectory.schedule()).add_forecast(trajectory.kernel)
    assert default_speedup(made) is None
    plain = Artifact(dict(made.header), made.tensors)
    set_default(made, "auto")
    kernel = kernel_of(made)
    assert kernel is not None
    calls = Forecast(kernel, "auto").plan(kernel.timesteps).calls
    set_default(made, 2)
    assert default_speedup(made) == 2.0
    made.save(tmp_path / "a.safetensors")
    found = Artifact.load(tmp_path / "a.safetensors")
    for options, skipped in (({}, 6), ({"speedup": 1.5}, 4), ({"speedup": 1}, 0)):
        with tn.attach(flux, found, **options) as attached:
            latent(flux)
            assert attached.counts()[""] == [12 - skipped, skipped]
    with tn.attach(flux, found, speedup="auto") as attached:
        latent(flux)
        assert attached.counts()[""] == [calls, 12 - calls]
    with tn.attach(flux, found, route=False) as attached:
        assert attached.counts() == {}
    for whole in (plain | found, found | plain):
        assert default_speedup(whole) == 2.0
    found.header["forecast"] = found.header["forecast"] | {"default": "fast"}
    with pytest.raises(ArtifactError, match="forecast"):
        found.validate()
    with pytest.raises(TenutoError, match="by default"):
        set_default(Artifact(dict(plain.header) | {"forecast": None}), 2)


def test_what_is_measured_goes_by_sizes_not_by_the_clock(
    flux: Any, trajectory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was killed and resumed ends in the same artifact, in spite of other work."""
    monkeypatch.setattr(estimates, "products_per_second", lambda *_: 1e-9)
    monkeypatch.setattr(estimates, "_timed", lambda *_: 1e9)
    assert measurable(flux, trajectory)
    monkeypatch.setattr(estimates, "products_per_second", lambda *_: 1e30)
    big = replace(trajectory, call={"height": 1 << 20, "width": 1 << 20})
    assert not measurable(flux, big) and measurable(flux, big, True)


def test_three_budgets_are_measured(flux: Any, trajectory: Any) -> None:
    """On prompts that were not recorded, and only where that is wanted and cheap."""
    assert measurable(flux, trajectory) and not measurable(flux, trajectory, False)
    assert not measurable(flux, replace(trajectory, kernel=None), True)
    seen: list[tuple[int, int]] = []
    made = Artifact.new(flux, trajectory.schedule()).add_forecast(trajectory.kernel)
    made = with_scores(flux, made, trajectory, lambda done, total, _: seen.append((done, total)))
    assert seen == [(0, 30), (12, 30), (20, 30), (26, 30), (30, 30)]  # 12, 8, 6 and 4 calls
    scores = made.header["forecast"]["measured"]["scores"]
    assert [row["speedup"] for row in scores] == [1.4, 2.0, 2.5]
    assert [row["skipped"] for row in scores] == [4, 6, 8]
    assert all(math.isfinite(row["psnr_db"]) for row in scores)
    scores[0]["psnr_db"] = "high"
    with pytest.raises(ArtifactError, match="forecast"):
        made.validate()
