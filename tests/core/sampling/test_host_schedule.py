"""What hosts say of noise, beside diffusers; the hosts' own classes are in tests/hosts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tenuto.errors import ModelError, TenutoError
from tenuto.runtime import Patches, host_kernel, with_kernel
from tenuto.sampling import host_noise, host_prediction, noises_at

FORGE = {"epsilon": "eps", "v_prediction": "v", "edm": "v", "const": "flow", "sample": None}


def test_an_alphas_table_is_that_of_diffusers() -> None:
    """A1111's model, at whole timesteps, between them and beyond."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    model = SimpleNamespace(alphas_cumprod=scheduler.alphas_cumprod, parameterization="v")
    noise, times = host_noise(model), (999.0, 500.25, 3.5, 0.0)
    assert noise is not None and host_prediction(model) == "v"
    for mine, theirs in zip(noise(times), noises_at(scheduler, times) or [], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)
    assert noise((1200.0, -3.0)) == noise((999.0, 0.0))


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_a_flow(unit: float) -> None:
    """Its timestep is the noise whatever the shift, of which the table has more values or fewer."""
    made = SimpleNamespace(
        sigmas=torch.linspace(0.001, 1, 1000) ** 0.5, prediction_type="const",
        timestep=lambda sigma: sigma * unit, sigma_data=None,
    )  # fmt: skip
    noise = host_noise(made)
    assert noise is not None
    found = noise((unit, 0.75 * unit, 0.3 * unit))
    assert [s for _, s in found] == pytest.approx([1.0, 0.75, 0.3], abs=1e-6)
    assert [a for a, _ in found] == pytest.approx([0.0, 0.25, 0.7], abs=1e-6)


@pytest.mark.parametrize("kind", FORGE)
def test_what_a_forge_model_predicts(kind: str) -> None:
    assert host_prediction(SimpleNamespace(prediction_type=kind)) == FORGE[kind]


def test_noise_of_latents_that_are_no_unit_wide() -> None:
    """EDM's: sigma is that of the latent's own deviation."""
    made = SimpleNamespace(
        sigmas=torch.logspace(-2, 1.5, 50), prediction_type="edm", sigma_data=0.5,
        timestep=lambda sigma: 0.25 * sigma.log(),
    )  # fmt: skip
    noise = host_noise(made)
    assert noise is not None
    ((alpha, sigma),) = noise((float(0.25 * made.sigmas[20].log()),))
    assert sigma / alpha == pytest.approx(float(made.sigmas[20]) / 0.5, rel=1e-4)


def test_equal_timesteps_of_a_table_count_once() -> None:
    def whole(sigma: Tensor) -> Tensor:
        return (sigma * 10).round()

    made = SimpleNamespace(sigmas=torch.linspace(0.1, 1, 40), prediction_type="const")
    made.timestep = whole
    noise = host_noise(made)
    assert noise is not None and len(noise.times) == 10 == len(set(noise.times))


def test_what_says_nothing_has_no_kernel() -> None:
    short: Any = SimpleNamespace(sigmas=torch.ones(1), timestep=lambda s: s)
    for made in (SimpleNamespace(), short, SimpleNamespace(alphas_cumprod=torch.ones(1))):
        with pytest.raises(ModelError, match="does not say"):
            host_kernel(made)
    kept = torch.linspace(0.999, 0.01, 1000)
    with pytest.raises(TenutoError, match="no default forecast"):
        host_kernel(SimpleNamespace(alphas_cumprod=kept))
    found = host_kernel(SimpleNamespace(alphas_cumprod=kept, parameterization="eps"))
    other = host_kernel(SimpleNamespace(alphas_cumprod=kept**2, parameterization="eps"))
    assert found.origin == "forecast-default" and found.mark != other.mark


def test_a_kernel_is_made_only_where_calls_are_skipped() -> None:
    def never() -> Any:
        raise AssertionError

    for speedup in (None, 1):
        assert with_kernel(Patches(speedup=speedup), never).kernel is None
