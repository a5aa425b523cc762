"""The relative error of a recorded call: in every artifact, and who is at fault where it is far."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tenuto as tn
from tenuto.artifact import Artifact
from tenuto.artifact.summary import about
from tenuto.calibration.result_check import checked
from tenuto.errors import ModelError
from tenuto.model import backbone, layers, tensors_in


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own, as 21cmPSDenoiser has them."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight * 1000 + 0.01, self.bias)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.mix = Standardised(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.own(x))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x) * (1 + t[:, None, None, None] / 1000)


def sample(denoiser: nn.Module, seed: int, batch: int) -> Tensor:
    x = torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    for t in (900.0, 500.0, 100.0):
        x = x - 0.1 * denoiser(x, torch.full((batch,), t))
    return x


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


@pytest.fixture
def trajectory(model: nn.Module) -> Any:
    return tn.record(model, sample=sample, batch=2, runs=1)


def test_it_is_that_of_the_attached_model(tiny: Any, recorded: Any, kind: str) -> None:
    """The largest of the first, the middle and the last step, at every scheme."""
    denoiser, trajectory = tiny(kind), recorded(kind)
    for scheme in ("w8a8", "w8a8-static"):
        artifact = tn.quantize(denoiser, scheme, trajectory)
        check, last = artifact.header["check"], len(trajectory.timesteps) - 1
        rows = {0, last // 2, last}
        assert check["timestep"] in [trajectory.timesteps[row] for row in rows]
        calls = [c for c in trajectory.calls if c.run == 0 and c.row in rows]
        errors = []
        with torch.no_grad():
            for call in calls:
                y = next(tensors_in(denoiser(**call.inputs)))
                with tn.attach(denoiser, artifact, execution="int8"):
                    off = next(tensors_in(denoiser(**call.inputs))) - y
                errors.append(float(off.norm() / y.norm()))
        assert check["relative_error"] == pytest.approx(max(errors), rel=0.02)
        assert 0 < check["relative_error"] < 0.15


def test_a_layer_of_its_own_kind_is_kept_in_float(model: nn.Module, trajectory: Any) -> None:
    artifact = tn.quantize(model, "w8a8", trajectory)
    assert set(artifact.header["layers"]) == {"layers.0.mix", "layers.1.mix", "out"}
    assert artifact.header["check"]["relative_error"] < 0.02
    assert artifact.header["left_in_float"] == {"Standardised": 2}
    assert "2 Standardised in float" in about("a file", artifact, 1)


def test_what_was_understood_wrongly_is_refused(
    model: nn.Module, trajectory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its class were torch's: everything else is in order, and the result is garbage."""
    monkeypatch.setattr(backbone, "computes_as_torch", lambda layer: True)
    assert len(list(layers(model))) == 5
    with pytest.raises(
        ModelError, match=r"useless: leave layers\.\d\.own, layers\.\d\.own"
    ) as said:
        tn.quantize(model, "w8a8", trajectory)
    assert len(str(said.value)) < 300


@pytest.mark.parametrize(("factor", "refused"), [(1.3, False), (1.9, True)])
def test_one_layer_that_is_off_is_named(
    model: nn.Module, trajectory: Any, caplog: Any, factor: float, refused: bool
) -> None:
    artifact = tn.quantize(model, "w8a8", trajectory)
    artifact.tensors["weights/out.scale"] *= factor
    with caplog.at_level(logging.WARNING, "tenuto"):
        if refused:
            with pytest.raises(ModelError, match="leave out, "):
                checked(model, artifact, trajectory, "cpu")
        else:
            found = checked(model, artifact, trajectory, "cpu")
            assert found["relative_error"] == pytest.approx(0.3, abs=0.03)
            assert "most of it by out, " in caplog.text


def test_a_model_that_says_nothing_has_no_entry(model: nn.Module, trajectory: Any) -> None:
    nn.init.zeros_(model.out.weight)  # type: ignore[union-attr]
    nn.init.zeros_(model.out.bias)  # type: ignore[union-attr]
    artifact = tn.quantize(model, "w8a8", trajectory)
    assert "check" not in artifact.header
    assert "recorded call" not in about("a file", artifact, 1)


def test_it_goes_with_its_weights(model: nn.Module, trajectory: Any, tmp_path: Any) -> None:
    """Read back, shown, and of the quantization that a merge keeps; a damaged one is refused."""
    artifact = tn.quantize(model, "w8a8", trajectory)
    artifact.save(tmp_path / "a.safetensors")
    found = Artifact.load(tmp_path / "a.safetensors")
    assert found.header["check"] == artifact.header["check"]
    assert "% off in a recorded call at timestep" in about("a file", found, 1)
    other = tn.quantize(model, "w8a16", trajectory)
    assert (found | other).header["check"] == other.header["check"]
    del other.header["check"]
    assert "check" not in (found | other).header
    found.header["check"] = {"relative_error": "much"}
    found.save(tmp_path / "b.safetensors")
    with pytest.raises(tn.TenutoError, match="damaged"):
        Artifact.load(tmp_path / "b.safetensors")
