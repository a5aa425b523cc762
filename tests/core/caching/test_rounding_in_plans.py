"""A forecast of a quantized model: its plan knows what rounding adds to each step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tenuto as tn
from tenuto.artifact import kernel_of
from tenuto.caching import ForecastPlan, Programme
from tenuto.calibration.replay import arguments
from tenuto.calibration.rounding_errors import with_rounding
from tenuto.errors import ArtifactError, TenutoError
from tenuto.model import denoiser_of
from tenuto.sampling import OutputKernel
from tests.core import tiny_pipelines as tiny
from tests.core.caching.test_forecast import kernel


def smooth() -> OutputKernel:
    """Of outputs that are forecast with large weights."""
    return kernel(width=2.0, rough=1e-9)


def of_quantized(scale: float) -> OutputKernel:
    """A kernel of 20 steps with rounding that grows towards the last ones."""
    found = smooth()
    return replace(found, rounding=tuple(scale * 10 ** (2 * i / 19) for i in range(20)))


def ends(plan: ForecastPlan, known: OutputKernel) -> tuple[float, float]:
    """(what forecasts do to the result, what rounding does), squared."""
    programme = Programme(known)
    counts = programme.gains * torch.tensor(plan.computed)
    moved = torch.zeros_like(programme.outputs[0])
    for step, (taps, weights) in enumerate(zip(plan.taps, plan.weights, strict=True)):
        if taps:
            gain, w = programme.gains[step], torch.tensor(weights, dtype=torch.float64)
            counts[list(taps)] += gain * w
            moved += gain * (w @ programme.outputs[list(taps)] - programme.outputs[step])
    noise = counts.square() @ torch.tensor(known.rounding, dtype=torch.float64)
    return float(moved.square().sum()), float(noise)


def test_weights_are_of_the_least_error_in_all() -> None:
    """Less of what rounding adds, at the cost of forecasts: the same steps are computed."""
    known = of_quantized(1e-5)
    plain = Programme(smooth()).plan(10)
    aware = Programme(known).plan(10)
    assert aware.computed == plain.computed and aware.taps == plain.taps
    (own, noise), (more, less) = ends(plain, known), ends(aware, known)
    assert less < 0.7 * noise and more > own
    assert less + more < 0.7 * (noise + own)
    for weights in aware.weights:
        if weights:
            assert sum(weights) == pytest.approx(1, abs=0.3)


def test_little_rounding_changes_little_and_none_nothing() -> None:
    plain = Programme(smooth()).plan(10)
    none, little = (Programme(of_quantized(scale)).plan(10) for scale in (0.0, 1e-14))
    assert Programme(replace(smooth(), rounding=())).plan(10) == plain
    for found in (none, little):
        for one, other in zip(found.weights, plain.weights, strict=True):
            assert one == pytest.approx(other, abs=1e-3)


def test_at_other_steps_it_is_what_the_nearest_two_have() -> None:
    known = of_quantized(1e-6)
    middle = [(a + b) / 2 for a, b in zip(known.timesteps, known.timesteps[1:], strict=False)]
    found = known.at([*middle, known.timesteps[-1]]).rounding
    between = [math.sqrt(a * b) for a, b in zip(known.rounding, known.rounding[1:], strict=False)]
    assert found == pytest.approx([*between, known.rounding[-1]], rel=1e-2)
    assert OutputKernel.of(known.stored, known.about()).rounding == known.rounding
    assert "rounding" not in kernel().about()
    assert known.guided(3.0).rounding == known.rounding


@pytest.mark.parametrize("rounding", [(1.0,), (-1.0,) * 20, (math.nan,) * 20])
def test_damage_is_told(rounding: tuple[float, ...]) -> None:
    with pytest.raises(TenutoError, match="rounding adds"):
        replace(kernel(), rounding=rounding)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A tiny Stable Diffusion with guidance in one call."""
    return tiny.stable_diffusion("StableDiffusionPipeline")


@pytest.fixture(scope="module")
def trajectory(pipe: Any) -> Any:
    """Two runs of two images, of ten steps."""
    return tn.record(pipe, ["a", "b", "c", "d"], steps=10, guidance=3.0, batch=2)


def test_it_is_measured_where_forecasts_are(pipe: Any, trajectory: Any) -> None:
    """Of what guidance makes of the outputs; not of another sampler than a pipeline's."""
    found, denoiser = tn.quantize(pipe, "w8a8", trajectory, measure=True), denoiser_of(pipe)

    def outputs() -> list[Tensor]:
        calls = [call for call in trajectory.calls if call.run == 0]
        with torch.no_grad():
            answers = [denoiser(**arguments(denoiser, call, "cpu"))[0] for call in calls]
        halves = [answer[:, :4].double().chunk(2) for answer in answers]
        return [u + 3.0 * (c - u) for u, c in halves]

    plain = outputs()
    with tn.attach(pipe, found, execution="int8", route=False):
        rounded = outputs()
    errors = [float((a - b).square().mean()) for a, b in zip(plain, rounded, strict=True)]
    assert found.header["forecast"]["rounding"] == pytest.approx(errors, rel=1e-2)
    known = kernel_of(found)
    assert known is not None and known.rounding == tuple(found.header["forecast"]["rounding"])
    bare = replace(trajectory, latent=lambda denoiser, seed, batch: torch.zeros(1))
    found.header["forecast"].pop("rounding")
    assert "rounding" not in with_rounding(pipe, found, bare).header["forecast"]
    found.header["forecast"]["rounding"] = [-1.0] * 10
    with pytest.raises(ArtifactError, match="forecast"):
        found.validate()
