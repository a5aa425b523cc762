"""A class-conditional DiT in pixel space goes through everything without a change to the core.

No pipeline, no VAE, 3 channels in and out, a null class for guidance, a DDIM loop of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.calibration.algorithms.adaround import AdaRound
from tenuto.calibration.presets import recipe_for

STEPS, NULL, GUIDANCE = 6, 10, 2.0


def ddim(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
    """One trajectory: image i has class (seed + i) % 10 and noise of seed + i."""
    alphas = torch.linspace(0.9999, 0.02, 1000, dtype=torch.float64)
    x = torch.stack(
        [
            torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed + i))
            for i in range(batch)
        ]
    )
    labels = torch.tensor([(seed + i) % 10 for i in range(batch)])
    both = torch.cat([labels, torch.full_like(labels, NULL)])
    times = torch.linspace(950, 50, STEPS).long()
    for place, t in enumerate(times):
        out = denoiser(torch.cat([x, x]), timestep=t.expand(2 * batch), class_labels=both).sample
        given, without = out.chunk(2)
        noise = without + GUIDANCE * (given - without)
        now = float(alphas[t])
        after = float(alphas[times[place + 1]]) if place + 1 < STEPS else 1.0
        clean = ((x - (1 - now) ** 0.5 * noise) / now**0.5).clamp(-1, 1)
        x = after**0.5 * clean + (1 - after) ** 0.5 * noise
    return x.clamp(-1, 1)


@pytest.fixture(scope="module")
def trajectory(tiny: Any) -> tn.Trajectory:
    return tn.record(tiny("dit"), sample=ddim, batch=2, runs=2, guidance=GUIDANCE)


@pytest.fixture(scope="module")
def weights(tiny: Any, trajectory: tn.Trajectory) -> tn.Artifact:
    """W4A8, little effort."""
    model = tiny("dit")
    rounding = AdaRound(iterations=20, batch=8)
    return tn.quantize(model, recipe_for(tn.schemes.W4A8, tn.describe(model), rounding), trajectory)


@pytest.fixture(scope="module")
def route(tiny: Any, trajectory: tn.Trajectory, weights: tn.Artifact) -> tn.Artifact:
    return tn.train_router(tiny("dit"), trajectory, reuse=0.4, artifact=weights, iterations=3)


def test_record(trajectory: tn.Trajectory) -> None:
    assert trajectory.steps == STEPS and len(trajectory.calls) == 2 * STEPS
    assert trajectory.timesteps[0] == 950 and trajectory.timesteps[-1] == 50
    first = trajectory.calls[0].inputs
    assert first["hidden_states"].shape == (4, 3, 8, 8)
    assert first["class_labels"].tolist() == [0, 1, NULL, NULL]


def test_quantize(weights: tn.Artifact) -> None:
    assert weights.header["family"] == "dit" and weights.header["model_class"].startswith("DiT")
    assert weights.header["prediction_type"] is None
    assert {f["scheme"] for f in weights.header["layers"].values()} == {"w4a8", "w8a8"}


def test_train_router(route: tn.Artifact) -> None:
    facts = route.header["route"]
    assert 0.35 < facts["reuse_ratio"] <= 0.5, "whole steps alone reach 1/3 or 1/2"
    assert facts["timesteps"][0] == 950 and len(facts["timesteps"]) == STEPS
    table = route.tensors["route/table"]
    assert table[0].all() and table.shape == (STEPS, 6)


def test_attach_draws_and_goes(
    tiny: Any, weights: tn.Artifact, route: tn.Artifact, tmp_path: Path, bits: Any
) -> None:
    model = tiny("dit")
    (weights | route).save(tmp_path / "dit.safetensors")
    artifact = tn.Artifact.load(tmp_path / "dit.safetensors")
    before = bits(model)
    with torch.no_grad():
        plain = ddim(model, 100, 3)
        with tn.attach(model, artifact) as attached:
            found = ddim(model, 100, 3)
            assert torch.equal(ddim(model, 100, 3), found)
            held = sum(h for _, h in attached.counts().values())
            total = sum(c + h for c, h in attached.counts().values())
        assert torch.equal(ddim(model, 100, 3), plain)
    assert bits(model) == before
    assert held / total == pytest.approx(artifact.header["route"]["reuse_ratio"], abs=0.08)
    assert found.shape == (3, 3, 8, 8) and not torch.equal(found, plain)
    assert float((found - plain).square().mean()) < float(plain.square().mean())


def test_compare(tiny: Any, weights: tn.Artifact, route: tn.Artifact, bits: Any) -> None:
    """Every number is there, or says that it was not measured."""
    model = tiny("dit")
    before = bits(model)
    found = tn.compare(model, weights | route, sample=ddim, count=4, batch=2).to_json()
    assert bits(model) == before
    assert 0 < found["psnr_db"]["p5"] <= found["psnr_db"]["median"] < 100
    assert found["steps"] == STEPS and found["count"] == 4
    assert found["int8_weight_share"] == 1.0
    assert found["reuse_ratio"] == pytest.approx(route.header["route"]["reuse_ratio"], abs=0.08)
    assert found["execution"]["mode"] == "int8"
    assert found["lpips"] is None, "8 x 8 is too small for it"
    assert found["resident_weight_bytes"]["artifact"] < found["resident_weight_bytes"]["float"]
