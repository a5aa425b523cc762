"""A bare denoiser's kernel: its user says what it answers, what an error is worth is measured."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.artifact import Artifact, kernel_of
from tenuto.errors import TenutoError
from tenuto.sampling.own_outputs import outputs_of

STEPS = 10
TIMES = torch.linspace(0.98, 0.02, STEPS + 1)


def noise(timestep: float) -> tuple[float, float]:
    angle = timestep / 999 * math.pi / 2
    return math.cos(angle), math.sin(angle)


PAIRS = [noise(float(t) * 999) for t in TIMES[:-1]]


class Known(nn.Module):
    """Whatever the sample is, it knows the image: noise = (x - alpha * x0) / sigma."""

    def __init__(self, knows: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)) for _ in range(2)
        )
        self.knows = knows

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = noise(float(t[0]))
        image = torch.linspace(-1, 1, 16).reshape(4, 4)
        sure = (x - alpha * image) / sigma
        return self.knows * sure + (1 - self.knows) * torch.tanh(x * (1 + t[0] / 999))


def sample(denoiser: Any, seed: int, batch: int) -> Tensor:
    x = torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    for now, after in itertools.pairwise(TIMES):
        (a, s), (b, r) = noise(float(now) * 999), noise(float(after) * 999)
        guess = denoiser(x, torch.full((batch,), float(now) * 999))
        x = b * (x - s * guess) / a + r * guess
    return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Known(0.9).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trajectory(model: nn.Module) -> Any:
    return tn.record(model, sample=sample, batch=3, runs=2, prediction="eps", noise=PAIRS)


def test_the_kernel_is_that_of_its_answers(model: nn.Module, trajectory: Any) -> None:
    kernel = trajectory.kernel
    answers = []
    with torch.no_grad():
        answers = [model(**c.inputs) for c in trajectory.calls]
    rows = torch.stack([torch.cat([answers[i], answers[STEPS + i]]) for i in range(STEPS)])
    rows = rows.flatten(1).double()
    assert torch.allclose(kernel.values, rows @ rows.T / rows.shape[1], atol=1e-6)
    assert kernel.images == 6 and kernel.prediction == "eps"
    assert kernel.alpha == pytest.approx([a for a, _ in PAIRS])
    assert kernel.timesteps == trajectory.timesteps


def test_a_function_says_the_same_and_a_factor_nothing(model: nn.Module, trajectory: Any) -> None:
    for said in (noise, lambda t: tuple(3 * x for x in noise(t))):
        found = tn.record(model, sample=sample, batch=3, runs=2, prediction="eps", noise=said)
        assert found.kernel.sigma == pytest.approx(trajectory.kernel.sigma)


def test_what_remains_of_an_error_is_measured(model: nn.Module, trajectory: Any) -> None:
    """A model that knows the image forgets what went wrong before; the last step stands."""
    left = trajectory.kernel.remaining
    assert len(left) == STEPS and all(0 < x < 2 for x in left)
    assert left[4] < left[-1] / 3
    (a, s), (b, r) = PAIRS[-1], noise(float(TIMES[-1]) * 999)
    assert left[-1] == pytest.approx((b * s / a - r) / (s / a), rel=0.25)
    unsure = tn.record(
        Known(0.0).eval(), sample=sample, batch=3, runs=1, prediction="eps", noise=noise
    ).kernel
    assert unsure is not None and unsure.remaining[4] > 3 * left[4]


def test_half_of_the_calls_of_a_bare_denoiser(model: nn.Module, trajectory: Any) -> None:
    artifact = Artifact.new(model, trajectory.schedule()).add_forecast(trajectory.kernel)
    wanted = sample(model, 50, 4)
    with tn.attach(model, artifact, speedup=2) as attached:
        found = sample(model, 50, 4)
        assert attached.counts()[""] == [5, 5]
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    assert torch.equal(sample(model, 50, 4), wanted)


def test_it_is_kept_in_files(model: nn.Module, trajectory: Any, tmp_path: Path) -> None:
    artifact = Artifact.new(model, trajectory.schedule()).add_forecast(trajectory.kernel)
    artifact.save(tmp_path / "a.safetensors")
    kernel = kernel_of(Artifact.load(tmp_path / "a.safetensors"))
    assert kernel is not None and kernel.mark == trajectory.kernel.mark
    assert kernel.remaining == trajectory.kernel.remaining


def test_at_other_steps(trajectory: Any) -> None:
    kernel = trajectory.kernel
    finer = kernel.at(torch.linspace(kernel.timesteps[0], kernel.timesteps[-1], 19).tolist())
    assert finer.remaining[::2] == pytest.approx(kernel.remaining)
    low, high = sorted(kernel.remaining[3:5])
    assert low <= finer.remaining[7] <= high


def test_a_sampler_that_does_not_repeat_itself_measures_nothing(model: nn.Module) -> None:
    def loose(denoiser: Any, seed: int, batch: int) -> Tensor:
        return sample(denoiser, seed, batch) + torch.randn(batch, 2, 4, 4)

    found = tn.record(model, sample=loose, batch=2, runs=1, prediction="eps", noise=noise)
    assert found.kernel is not None and found.kernel.remaining == ()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"prediction": "eps"}, "given together"),
        ({"noise": noise}, "given together"),
        ({"prediction": "epsilon", "noise": noise}, "one of v, eps"),
        ({"prediction": "eps", "noise": [(1.0,)] * STEPS}, "two numbers"),
        ({"prediction": "eps", "noise": [(0.0, 0.0)] * STEPS}, "no share"),
        ({"prediction": "eps", "noise": [(1.0, math.nan)] * STEPS}, "no share"),
        ({"prediction": "eps", "noise": PAIRS[:-1]}, "9 pairs, and the sampler made 10 steps"),
    ],
)
def test_what_is_said_wrongly_is_refused(model: nn.Module, said: Any, words: str) -> None:
    with pytest.raises(TenutoError, match=words):
        tn.record(model, sample=sample, batch=2, runs=3, **said)


def test_a_pipeline_needs_no_word_of_it() -> None:
    with pytest.raises(TenutoError, match="scheduler says"):
        outputs_of(object(), None, "eps", noise)


def test_a_plan_weighs_errors_by_what_remains(trajectory: Any) -> None:
    kernel = trajectory.kernel
    plain = replace(kernel, remaining=())
    left = torch.tensor(kernel.remaining).double()
    assert torch.allclose(kernel.gains(), plain.gains() * left)
    assert kernel.mark != plain.mark
    with pytest.raises(TenutoError, match="positive number of every step"):
        replace(kernel, remaining=kernel.remaining[:-1])
